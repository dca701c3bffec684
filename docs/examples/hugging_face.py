"""A model of yours as a repository of the Hugging Face hub, here in a local folder."""

import timm
import torch
from timm.models import save_for_hf

import zoo  # noqa: F401  makes the names known to timm

model = timm.create_model("van_b0", num_classes=3).eval()
about = {"label_names": ["cat", "dog", "owl"]}

# To the hub itself, after `hf auth login`, with the same arguments:
# timm.models.push_to_hf_hub(model, "me/van-pets", model_config=about, safe_serialization=True)
save_for_hf(model, "van-pets", model_config=about, safe_serialization=True)

# From the hub: "hf-hub:me/van-pets". The architecture is ours, so who loads it has to `import zoo`, too.
again = timm.create_model("local-dir:van-pets", pretrained=True).eval()

image = torch.randn(1, 3, 224, 224)
with torch.no_grad():
    same = torch.equal(model(image), again(image))
print("the same logits:", same, "for", again.pretrained_cfg["label_names"])
