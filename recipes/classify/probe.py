"""Probes of a frozen model: `zoo-train probe=linear`, `probe=knn` and `probe=ep`.

The features of the images are computed once, without augmentation, and cached (`zoo.recipes.features`). A probe is then
a small model of these features; the validation images are used once, at the end. A linear probe and efficient probing
become the classifier of the model, so that their runs are those of classifiers.
"""

from __future__ import annotations

import copy
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from timm.task import ClassificationEvaluator
from torch import Tensor, nn

from zoo.backbone import Backbone
from zoo.efficient_probing import attach, probing_head
from zoo.messages import UserError
from zoo.opening import check_name
from zoo.recipes import config, distributed, logs, records, run_folder
from zoo.recipes.base_run import BaseRun, command_to_resume
from zoo.recipes.classify.accuracy import Evaluation, Normalize, percentage, plot_predictions
from zoo.recipes.classify.attention import plot_attention
from zoo.recipes.classify.data import Data, Samples, build_transform, hold_out, open_data
from zoo.recipes.classify.model import build_model, input_config, write_description
from zoo.recipes.classify.probe_heads import Fit, LinearHeads, ProbingHeads, Rows, nearest_votes, score
from zoo.recipes.errors import Stopped
from zoo.recipes.features import Features, split_features
from zoo.recipes.logs import log
from zoo.recipes.progress import Progress
from zoo.recipes.run_weights import save_weights
from zoo.recipes.seeding import seed_all

_LOGGED = 5  # epochs of a fit that are logged
_CHUNK = 512  # rows of features that are compared with all others at once
_RANDOM = (
    "The model has random weights (pretrained=false), so this probe says what its architecture alone can do: give "
    "pretrained=true, a checkpoint or a run folder to probe what a model has learnt."
)
_COMPARED = 8  # images on which the saved model is compared with the probe
_TOLERANCE = 1e-2  # of the largest logit; mixed precision rounds features
_LARGER = "give larger images, data.img_size=<pixels>."


def train(
    cfg: DictConfig, write_report: Callable[[Path], Any] | None = None, resume_command: str | None = None
) -> dict[str, Any]:
    """Probe as `cfg` says and return the content of `summary.json`.

    Args:
        cfg: The configuration.
        write_report: Writes the report into the run folder when the run ends; None for no report.
        resume_command: The command that continues the run, if it is not the command of this process.

    Raises:
        UserError: The user can correct the cause; the message says how.
        Stopped: A signal arrived. The features that were computed completely stay in the cache.
    """
    config.check(cfg)
    check_name(cfg.model)
    device = distributed.setup(cfg.trainer.device)
    logs.start_log(None, distributed.rank() == 0)
    if distributed.world_size() > 1:
        raise UserError(f"probe={cfg.probe.kind} runs in one process: start zoo-train without torchrun.")
    data = open_data(cfg.data, cfg.seed)
    if data.multi_label:
        raise UserError(f"probe={cfg.probe.kind} needs one class per image, but these images have several labels.")
    with run_folder.locked_folder(Path(cfg.run) if cfg.run else None, name=f"{cfg.model}-{cfg.probe.kind}") as folder:
        return ProbeRun(cfg, data, device, folder, write_report, resume_command).run()


class ProbeRun(BaseRun):
    """A run of a probe, from the features to `summary.json`."""

    def __init__(
        self,
        cfg: DictConfig,
        data: Data,
        device: torch.device,
        folder: Path,
        write_report: Callable[[Path], Any] | None = None,
        resume_command: str | None = None,
    ):
        self.plain_cfg, self.kind = cfg, cfg.probe.kind
        if self.kind == "ep":  # the configuration of the run describes the model that is saved
            cfg = copy.deepcopy(cfg)
            OmegaConf.update(cfg, "model_kwargs.global_pool", f"ep{cfg.probe.queries or ''}", force_add=True)
        super().__init__(cfg, device, folder, write_report, resume_command)
        if self.kind == "knn":  # nearest neighbours are no classifier of a model
            self.last_files = tuple(name for name in self.last_files if name != "model.safetensors")
        self.data = data
        seed_all(cfg.seed)
        model = build_model(self.plain_cfg, len(data.classes), new_classifier=True)
        self.model: Any = model.eval().requires_grad_(False).to(device)
        self.params = sum(p.numel() for p in self.model.parameters())
        self.data_config = input_config(self.model, cfg.data)
        self.normalize = Normalize(self.data_config, device, cfg.trainer.channels_last)
        transform, size = build_transform(None, self.data_config), self.data_config["input_size"]
        self.val_samples = Samples(data.val, transform, cfg.seed, False, size, max_pixels=cfg.data.max_pixels)
        self.about: dict[str, Any] = {"kind": self.kind}  # of the summary
        state = self.find_checkpoint()
        if state:
            self.load_state(state)

    # Methods that each task defines.

    def identity(self) -> dict[str, Any]:
        """The settings that have to stay the same within a run."""
        return {"model": self.cfg.model, "classes": list(self.data.classes), "probe": self.kind}

    def state(self) -> dict[str, Any]:
        """A probe is not continued, so there is no state."""
        return {}

    def log_plan(self) -> None:
        """Log what is going to be done."""
        cfg, probe = self.cfg, self.cfg.probe
        size = "x".join(map(str, self.data_config["input_size"]))
        classes = len(self.data.classes)
        log.info("%s: %.2f M parameters, frozen; input %s, %d classes", cfg.model, self.params / 1e6, size, classes)
        for line in self.describe_data():
            log.info("%s", line)
        if self.kind == "knn":
            log.info("probe=knn: the %d nearest training images vote (probe.k)", probe.k)
        else:
            rates = ", ".join(f"{rate:g}" for rate in probe.lrs)
            plan = "probe=%s: %d epochs in batches of %d; learning rates: %s"
            log.info(plan, self.kind, probe.epochs, probe.batch_size, rates)
        if cfg.pretrained is False:
            log.warning("%s", _RANDOM)
        log.info("Run folder: %s", self.folder)

    def describe_data(self) -> list[str]:
        """Describe each split in one line."""
        splits = {"training": self.data.train_indices, "validation": self.data.val_indices}
        return [f"{split}: {'a stream' if i is None else f'{len(i)} images'}" for split, i in splits.items()]

    def is_complete(self) -> bool:
        """Whether the probe has been evaluated."""
        return self.progress["finished"]

    def way_to_continue(self) -> str:
        """A finished probe can't be made longer."""
        return ""

    def curves(self) -> tuple[str, dict[str, str]]:
        """The title of the plotted curves, and the titles of the plotted scores by name."""
        return f"{self.cfg.model}, {self.folder.name}", {} if self.kind == "knn" else {"top1": "top-1"}

    def _on_signal(self, number: int, frame: Any) -> None:
        """Stop at once: complete features are in the cache, and the rest takes little time."""
        command = self.resume_command or command_to_resume(self.cfg, self.folder)
        raise Stopped(f"Stopped. Start again with: {command}", number)

    # The probe.

    def train(self) -> None:
        """Compute the features, fit the probe and evaluate it."""
        self.history = []
        self.progress |= {"update": 0}
        kind = "map" if self.kind == "ep" else "pooled"
        training, validation = (
            split_features(self.plain_cfg, self.model, self.data, split, kind) for split in ("train", "val")
        )
        self.training, self.validation = training, validation
        if len(training.labels) < 2:
            raise UserError("there is a single training image: a probe needs two or more.")
        if self.kind == "knn":
            self._vote()
        else:
            self._fit()
        metrics = self.result.metrics
        last = self.history[-1]
        last |= {f"val_{name}": metrics[name] for name in ("loss", "top1", "top5") if name in metrics}
        last |= {"corrupt_images": len(self.result.corrupt), "seconds": self.seconds()}
        self.best = {"epoch": last["epoch"], "top1": metrics["top1"]}
        self.progress["finished"] = True
        self.write_history()
        for record in self.history:
            self.log_record(record)

    def _vote(self) -> None:
        """The nearest neighbours of each validation image among the training images."""
        cfg = self.cfg.probe
        if cfg.k > len(self.training.labels):
            raise UserError(f"probe.k={cfg.k}, but there are {len(self.training.labels)} training images: lower it.")
        bank, queries = (torch.from_numpy(np.array(split.values)) for split in (self.training, self.validation))
        bank, labels = bank.to(self.device), torch.from_numpy(self.training.labels).to(self.device)
        vote = partial(nearest_votes, num_classes=len(self.data.classes), k=cfg.k, temperature=cfg.temperature)
        votes = torch.cat([vote(bank, labels, part.to(self.device)).cpu() for part in queries.split(_CHUNK)])
        self._evaluate(votes)
        del self.result.metrics["loss"]  # votes are no probabilities
        self.about |= {"k": cfg.k}
        self.history.append({"epoch": 0, "update": 0})

    def _fit(self) -> None:
        """Choose the learning rate on held-out training images, and train with it on all of them."""
        cfg, labels = self.cfg.probe, self.training.labels
        rates = list(cfg.lrs)
        if self.kind == "ep":
            self._add_probing_head()
        else:
            self.layers = _linear_layers(self.model, self.training.values.shape[1], self.cfg.model)
        if len(rates) > 1:
            fitted, held = hold_out(labels.tolist(), cfg.holdout, self.cfg.seed)
            if not held:
                raise UserError(
                    f"no training image can be held out to choose among {len(rates)} learning rates, because no class "
                    "has two: give a single one, probe.lrs=[<rate>]."
                )
            log.info("%d training images are held out to choose the learning rate (probe.holdout).", len(held))
            heads = self._train_heads("learning rates", self._rows(self.training, fitted), rates)
            top1, losses = score(heads, self._rows(self.training, held))
            rates = [self._choose(rates, top1, losses, len(held))]
        heads = self._train_heads("probe", self._rows(self.training, range(len(labels))), rates, self.history)
        heads.eval()
        with torch.no_grad():
            every = self._rows(self.validation, range(len(self.validation.labels)))
            logits = torch.cat([heads(x)[0].cpu() for x, _ in every.batches()])
        if not logits.isfinite().all():
            raise UserError(
                f"the probe diverged with the learning rate {rates[0]:g}: give lower ones, probe.lrs=[...]."
            )
        self._install(heads)
        self._compare(logits)
        self._evaluate(logits)

    def _choose(
        self, rates: Sequence[float], top1: Sequence[float | None], losses: Sequence[float], held: int
    ) -> float:
        """The best learning rate, by the accuracy on the held-out images and then by the loss."""
        order = sorted(range(len(rates)), key=lambda i: (-1.0 if top1[i] is None else top1[i], -losses[i]))
        best = order[-1]
        if top1[best] is None:
            raise UserError(f"the probe diverged with all learning rates, probe.lrs={list(rates)}: give lower ones.")
        for i, rate in enumerate(rates):
            log.info("  learning rate %g: top-1 %s%s", rate, percentage(top1[i]), " (chosen)" if i == best else "")
        self.about |= {
            "rates": [{"lr": rate, "held_out_top1": value} for rate, value in zip(rates, top1, strict=True)],
            "chosen": rates[best],
            "held_out_images": held,
        }
        if len(rates) > 2 and rates[best] in (min(rates), max(rates)):
            end = "lowest" if rates[best] == min(rates) else "highest"
            log.warning("The chosen learning rate is the %s that was tried: add others to probe.lrs.", end)
        return rates[best]

    def _train_heads(
        self, title: str, rows: Rows, rates: list[float], history: list[dict[str, Any]] | None = None
    ) -> LinearHeads | ProbingHeads:
        """Train a head for each learning rate; `history` gets a record per epoch, of the first one."""
        cfg, progress = self.cfg.probe, self.progress
        heads: LinearHeads | ProbingHeads
        if self.kind == "linear":
            heads = LinearHeads(*rows.moments(), len(self.data.classes), len(rates)).to(self.device)
        else:
            heads = ProbingHeads(probing_head(self.model), len(rates)).to(self.device)
        fit = Fit(heads, rates, rows, cfg.epochs, cfg.batch_size, self.cfg.seed)
        shown = np.linspace(1, cfg.epochs, min(_LOGGED, cfg.epochs)).round().astype(int).tolist()
        bar = Progress(True, cfg.epochs, fit.updates, every=10**9)

        def show(losses: Tensor) -> None:
            bar.advance(f"loss {losses.min():.3f}", max(rates), fit.batch_size)

        with bar:
            for epoch in range(1, cfg.epochs + 1):
                bar.start(f"{title}, epoch {epoch}/{cfg.epochs}", 0)
                losses, right = fit.run_epoch(show)
                progress["update"] += fit.updates
                loss, top1 = losses[0].item(), 100 * right[0].item()
                if history is not None:
                    rate = fit.optimizer.param_groups[0]["lr"]
                    record = {"epoch": epoch, "update": progress["update"], "lr": rate, "train_loss": loss}
                    history.append({**record, "train_top1": top1, "seconds": self.seconds()})
                    if epoch in shown:
                        log.info("%s | training loss %.4f top-1 %.2f %%", bar.title, loss, top1)
        return heads

    def _rows(self, features: Features, rows: Sequence[int]) -> Rows:
        prepare = self._head_input if self.kind == "ep" else _unchanged
        return Rows(features.values, features.labels, np.asarray(rows), prepare, self.device)

    # Efficient probing.

    def _add_probing_head(self) -> None:
        seed_all(self.cfg.seed, 1)
        classes, model = len(self.data.classes), self.model
        with torch.no_grad():
            size = self.data_config["input_size"]
            self.tokens = model.forward_features(torch.zeros(1, *size, device=self.device)).ndim == 3
        try:
            if isinstance(model, Backbone):
                model.reset_classifier(classes, self.cfg.model_kwargs.global_pool)
                model.head.requires_grad_(True)
            else:
                attach(model, classes, self.cfg.probe.queries, self.data_config["input_size"][1:])
        except ValueError as error:
            raise UserError(f"probe=ep can't be used with {self.cfg.model}: {error}") from error

    @torch.no_grad()
    def _head_input(self, maps: Tensor) -> Tensor:
        """What the head of efficient probing gets for cached maps (B, C, H, W): tokens (B, H W, C).

        What a model computes between its maps and its classifier, such as a norm, comes before the head.
        """
        model, head = self.model, probing_head(self.model)
        if isinstance(model, Backbone):
            return model.pre_logits(head.pool.tokens(maps))
        if self.tokens:
            features = maps.flatten(2).transpose(1, 2)
            prefix = features.new_zeros(len(maps), head.pool.prefix_tokens, features.shape[2])
            features = torch.cat((prefix, features), 1)
        else:
            features = maps.permute(0, 2, 3, 1) if head.pool.channels_last else maps
        given: list[Tensor] = []
        with head.pool.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0])):
            model.forward_head(features)
        return head.pool.tokens(given[0])

    # The result.

    def _evaluate(self, logits: Tensor) -> None:
        """Score logits or votes (N, classes) for the validation images."""
        evaluator = ClassificationEvaluator(device=torch.device("cpu"))
        targets = torch.from_numpy(self.validation.labels)
        evaluator.update(logits, targets)
        self.result = Evaluation(
            metrics={**evaluator.compute(distributed=False), "images": len(targets)},
            targets=targets.numpy(),
            predictions=logits.argmax(1).numpy(),
            corrupt=sorted({*self.training.corrupt, *self.validation.corrupt}),
        )

    def _install(self, heads: Any) -> None:
        """Make the probe the classifier of the model."""
        if self.kind == "ep":
            probing_head(self.model).load_state_dict(heads.heads[0].state_dict())
            return
        weight, bias = heads.plain()
        for layer in self.layers:
            layer.weight.data.copy_(weight.detach().view_as(layer.weight))
            layer.bias.data.copy_(bias.detach())

    @torch.no_grad()
    def _compare(self, logits: Tensor) -> None:
        """Refuse a model whose logits for images differ from the probe's for their features."""
        if self.data.val_indices is None:
            return
        places = self.validation.positions[:_COMPARED].tolist()
        images = torch.stack([self.val_samples[0, place][0] for place in places])
        got = self.model.eval()(self.normalize(images)).float().cpu()
        want = logits[: len(places)]
        if (got - want).abs().max() > _TOLERANCE * want.abs().max() * (1 if self.cfg.trainer.amp == "none" else 10):
            raise UserError(
                f"{self.cfg.model} does not compute its logits from its features alone, so probe={self.kind} can't "
                "become its classifier: use probe=knn."
            )

    def finish(self) -> dict[str, Any]:
        """Write the final files and return the summary."""
        folder, classes, metrics = self.folder, self.data.classes, self.result.metrics
        self.result.write_classes(folder, classes)
        pictures = []
        if self.kind != "knn":
            save_weights(folder / "model.safetensors", _on_cpu(self.model), self.cfg.model, classes)
            write_description(folder, self.model, self.cfg, classes, self.data_config)
            self.params = sum(p.numel() for p in self.model.parameters())
            if self.data.val_indices is not None:
                pictures = [folder / "predictions.png"]
                shown = self.validation.positions.tolist()
                plot_predictions(pictures[0], self.model, self.val_samples, shown, self.normalize, classes)
                size = self.validation.values.shape[2:]  # of maps; pooled features have none
                if size == (1, 1):
                    log.warning(
                        "The last map is a single token, so there is no attention to draw or to gain from: %s", _LARGER
                    )
                elif size:
                    pictures.append(folder / "attention.png")
                    plot_attention(pictures[1], self.model, self.val_samples, shown, self.normalize, classes, size)
        self.save()
        if self.wandb:
            records.log_pictures(self.wandb, pictures)
        summary = self.write_summary(
            {name: metrics[name] for name in ("top1", "top5", "loss") if name in metrics},
            probe=self.about,
            params=self.params,
            epochs=self.history[-1]["epoch"],
            train_images=len(self.training.labels),
            val_images=len(self.validation.labels),
            classes=len(classes),
            corrupt_images=self.result.corrupt,
        )
        images = len(self.validation.labels)
        what = config.PROBES[self.kind]
        log.info("%s: top-1 %s on %d validation images", what, percentage(metrics["top1"]), images)
        log.info("Run folder: %s", folder)
        self._log_next_steps()
        return summary

    def _log_next_steps(self) -> None:
        path = shlex.quote(str(self.folder))
        if self.kind == "knn":
            log.info("What next: probe=linear or probe=ep, which give a model that zoo-eval and zoo-predict take.")
            return
        log.info("Weights: %s: the frozen model with the probe as its classifier", self.folder / "model.safetensors")
        log.info("What next:")
        log.info("  zoo-eval %s", path)
        log.info("  zoo-predict %s photos/ out/", shlex.quote(f"run={self.folder}"))
        log.info("  zoo-export %s", path)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _on_cpu(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of `model` in memory of its own, as safetensors needs it."""
    return {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}


def _linear_layers(model: Any, channels: int, name: str) -> list[nn.Linear | nn.Conv2d]:
    """The layers of the classifier. If there are several, the logits are a mean, and all get the same weights.

    Raises:
        UserError: They are not linear in the `channels` of pooled features.
    """
    found = model.get_classifier()
    parts = found if isinstance(found, list | tuple) else [found]
    layers = [m for part in parts for m in part.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    right = [layer for layer in layers if layer.weight.shape[1:].numel() == channels and layer.bias is not None]
    if not layers or len(right) < len(layers):
        kind = type(parts[0]).__name__
        raise UserError(
            f"the classifier of {name}, {kind}, is no linear layer with a bias for its {channels} pooled features, so "
            "probe=linear can't become it: use probe=knn."
        )
    return layers
