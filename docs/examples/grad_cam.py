"""Class activation map of a classifier: pytorch-grad-cam on the last stage, drawn over a photograph in cam.png."""

import numpy as np
import timm
from PIL import Image
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import show_cam_on_image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from sklearn.datasets import load_sample_image

import zoo  # noqa: F401  registers the models with timm

# The weights are random here. For a meaningful map, use pretrained=True or the name "local-dir:runs/<folder>".
model = timm.create_model("gc_vit_xxtiny").eval()
config = timm.data.resolve_model_data_config(model)
photo = Image.fromarray(load_sample_image("flower.jpg")).resize((320, 224))  # any size works, square or not
pixels = np.asarray(photo, dtype=np.float32) / 255
image = timm.data.create_transform(**{**config, "input_size": (3, 224, 320), "crop_pct": 1.0})(photo)[None]

# The output of a stage is (batch, channels, height, width), so reshape_transform is not needed.
with GradCAM(model, target_layers=[model.stages[-1]]) as cam:
    heat = cam(image, targets=[ClassifierOutputTarget(985)])[0]  # 985: daisy
Image.fromarray(show_cam_on_image(pixels, heat, use_rgb=True)).save("cam.png")
print("cam.png:", heat.shape)
