"""U-Net of segmentation_models_pytorch with an encoder of zoo: after `tu-`, it accepts the name of any timm model."""

import segmentation_models_pytorch as smp
import torch

import zoo  # noqa: F401  registers the models with timm

# encoder_weights="imagenet" starts from the published weights.
model = smp.Unet("tu-van_b0", encoder_weights=None, in_channels=3, classes=4)
loss_of = smp.losses.DiceLoss("multiclass")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

torch.manual_seed(0)
masks = torch.zeros(2, 96, 64, dtype=torch.long)
masks[0, 20:60, 10:40], masks[1, 50:90, 30:60] = 1, 2  # each image has a rectangle of another class
images = masks[:, None] + 0.1 * torch.randn(2, 3, 96, 64)

losses = []
for _ in range(5):
    loss = loss_of(model(images), masks)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print("loss:", ", ".join(f"{loss:.3f}" for loss in losses))
