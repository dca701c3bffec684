"""Inference server: POST an image to get the five most likely classes with their probabilities.

python inference_server.py local-dir:runs/mine
curl --data-binary @photo.jpg http://localhost:8000
"""

import io
import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

import timm
import torch
from PIL import Image

import zoo  # noqa: F401  registers the models with timm

model = timm.create_model(sys.argv[1], pretrained=True).eval()
names = model.pretrained_cfg.get("label_names") or range(model.num_classes)
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
compiled = torch.compile(model)


class Handler(BaseHTTPRequestHandler):
    """Classify one image per request."""

    def do_POST(self) -> None:
        """Answer with the classes and their probabilities as JSON."""
        try:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            image = Image.open(io.BytesIO(data)).convert("RGB")
        except (OSError, TypeError):
            return self.send_error(400, "not an image")
        with torch.inference_mode():
            best = compiled(transform(image)[None])[0].softmax(0).topk(min(5, len(names)))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({names[i]: p.item() for p, i in zip(*best, strict=True)}).encode())


if __name__ == "__main__":
    HTTPServer(("localhost", 8000), Handler).serve_forever()
