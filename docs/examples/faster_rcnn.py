"""torchvision's Faster R-CNN with a backbone of zoo and a feature pyramid network."""

import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

import zoo  # noqa: F401  registers the models with timm


class Pyramid(nn.Module):
    """Compute five feature maps with 256 channels and strides 4 to 64 from images (B, 3, H, W)."""

    def __init__(self, name: str, **kwargs):
        super().__init__()
        self.body = timm.create_model(name, features_only=True, **kwargs)
        self.out_channels = 256
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), self.out_channels, LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the feature maps by name, as FasterRCNN expects them."""
        return self.fpn({str(i): features for i, features in enumerate(self.body(images))})


torch.manual_seed(0)
backbone = Pyramid("gc_vit_xxtiny")  # pretrained=True starts from the published weights
model = FasterRCNN(backbone, num_classes=3, min_size=160, max_size=256)

images = [torch.rand(3, 160, 200), torch.rand(3, 120, 160)]  # any size, values from 0 to 1
targets = [
    {"boxes": torch.tensor([[20.0, 30.0, 90.0, 110.0]]), "labels": torch.tensor([1])},
    {"boxes": torch.tensor([[10.0, 10.0, 60.0, 80.0]]), "labels": torch.tensor([2])},
]
losses = model(images, targets)
sum(losses.values()).backward()
print({name: round(loss.item(), 3) for name, loss in losses.items()})

with torch.no_grad():
    found = model.eval()(images)
print([len(objects["boxes"]) for objects in found], "objects")
