"""UperNet and Mask2Former of Hugging Face's transformers on a backbone of zoo: a training step, saved, loaded again."""

import torch
import transformers
from transformers import TimmBackboneConfig

import zoo  # noqa: F401  registers the models with timm; whoever loads the checkpoint needs it, too

torch.manual_seed(0)
images, labels = torch.randn(2, 3, 96, 128), torch.randint(3, (2, 96, 128))
masks = [torch.eye(3)[image].permute(2, 0, 1) for image in labels]  # one for each class
small = {"hidden_size": 32, "num_labels": 3}  # for this example; without it, the papers' sizes
decoder = {"feature_size": 32, "mask_feature_size": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 8}

found = {}
for name, kind, settings, target, output in (
    ("UperNet", "ForSemanticSegmentation", small, {"labels": labels}, "logits"),
    (
        "Mask2Former",
        "ForUniversalSegmentation",
        small | decoder,
        {"mask_labels": masks, "class_labels": [torch.arange(3)] * 2},
        "masks_queries_logits",
    ),
):
    backbone = TimmBackboneConfig(backbone="test_van", out_indices=[0, 1, 2, 3])
    model_class, config = getattr(transformers, f"{name}{kind}"), getattr(transformers, f"{name}Config")
    model = model_class(config(backbone_config=backbone, **settings)).train()
    # For published weights, load timm.create_model(..., features_only=True, pretrained=True).state_dict() into
    # model.backbone._backbone (UperNet) or model.model.pixel_level_module.encoder._backbone (Mask2Former).
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loss = model(pixel_values=images, **target).loss
    loss.backward()
    optimizer.step()

    model.eval().save_pretrained(name)
    again = model_class.from_pretrained(name).eval()
    with torch.no_grad():
        same = torch.equal(*(net(pixel_values=images)[output] for net in (model, again)))
    found[name] = {"loss": loss.item(), "same": same, "model": model}
    print(f"{name}: loss {loss:.3f}; the same output after it is loaded again: {same}")
