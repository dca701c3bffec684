"""Your own model as a repository of the Hugging Face Hub, here in a local folder."""

import timm
import torch
from timm.models import save_for_hf

import zoo  # noqa: F401  registers the models with timm

model = timm.create_model("van_b0", num_classes=3).eval()
about = {"label_names": ["cat", "dog", "owl"]}

# To upload it to the Hub, run `hf auth login` and call this with the same arguments:
# timm.models.push_to_hf_hub(model, "me/van-pets", model_config=about, safe_serialization=True)
save_for_hf(model, "van-pets", model_config=about, safe_serialization=True)

# On the Hub, its name is "hf-hub:me/van-pets". zoo provides the architecture, so whoever loads it must `import zoo`.
again = timm.create_model("local-dir:van-pets", pretrained=True).eval()

image = torch.randn(1, 3, 224, 224)
with torch.no_grad():
    same = torch.equal(model(image), again(image))
print("the same logits:", same, "for", again.pretrained_cfg["label_names"])
