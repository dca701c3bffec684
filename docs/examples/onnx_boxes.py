"""Boxes with ONNX Runtime: run the file that zoo-export wrote for a RetinaNet, and draw the objects that it finds.

zoo-export runs/digits -o digits.onnx
python onnx_boxes.py digits.onnx photo.jpg found.png
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw

LEAST = 0.5  # the lowest score of the objects that are drawn

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
facts = json.loads(session.get_modelmeta().custom_metadata_map["zoo"])
image = Image.open(sys.argv[2]).convert("RGB")

# Resize as in the evaluation, normalize, and pad with zeros on the right and below.
factor = min(facts["short_side"] / min(image.size), facts["max_size"] / max(image.size))
resized = image.resize([int(side * factor + 0.5) for side in image.size], Image.Resampling.BILINEAR)
pixels = (np.asarray(resized) / 255 - facts["preprocessing"]["mean"]) / facts["preprocessing"]["std"]
padding = [(0, -side % facts["size_divisor"]) for side in pixels.shape[:2]]
images = np.pad(pixels, [*padding, (0, 0)]).transpose(2, 0, 1)[None].astype(np.float32)
scores, boxes = (output[0] for output in session.run(None, {"images": images}))

# Non-maximum suppression of each class by itself; an anchor can be kept for several classes.
anchors, labels = np.nonzero(scores >= LEAST)
found = []  # class, score, and box in pixels of the photo
left = sorted(zip(scores[anchors, labels], labels, boxes[anchors], strict=True), key=lambda item: -item[0])
while left and len(found) < facts["max_per_image"]:
    (score, label, box), *left = left
    found.append((facts["classes"][label], float(score), np.clip(box / factor, 0, [*image.size] * 2)))
    others = np.array([other for _, _, other in left]).reshape(-1, 4)
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    overlap = sides.clip(0).prod(1)
    iou = overlap / ((box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - overlap)
    left = [item for item, value in zip(left, iou, strict=True) if item[1] != label or value <= facts["iou_threshold"]]

draw = ImageDraw.Draw(image)
for name, score, box in found:
    draw.rectangle(box.tolist(), outline="red", width=2)
    draw.text((box[0] + 3, box[1] + 1), f"{name} {score:.2f}", fill="red")
image.save(sys.argv[3])
