"""The state of a classifier in training: model, optimizer, schedule, averaged weights, and one update of them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import create_classification_loss
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, MultiLabelClassificationTask
from timm.utils import ModelEmaV3, dispatch_clip_grad, unwrap_model
from torch import nn
from torch.distributed.checkpoint import state_dict as sharded_state
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from zoo import freezing
from zoo.messages import UserError, one_line
from zoo.recipes import config, distributed, lr_factors
from zoo.recipes.classify import distillation
from zoo.recipes.classify.exits import ExitLoss
from zoo.recipes.config import OptimConfig
from zoo.recipes.logs import log

_FULL = sharded_state.StateDictOptions(full_state_dict=True, cpu_offload=True)


class TrainState:
    """A model in training, with all that an update changes.

    Args:
        cfg: The configuration.
        model: The model, which is moved, wrapped or sharded.
        num_classes: The number of classes.
        updates_per_epoch: The updates in an epoch, the unit of the schedule.
        device: Where to train.
        multi_label: Whether labels are float (B, num_classes) and not int (B,).
        loss: Maps logits and labels to the loss; None for that of timm.
        teacher: The teacher of the model, if it has one.
    """

    def __init__(
        self,
        cfg: DictConfig,
        model: nn.Module,
        num_classes: int,
        updates_per_epoch: int,
        device: torch.device,
        multi_label: bool = False,
        loss: nn.Module | None = None,
        teacher: distillation.Teacher | None = None,
    ):
        self.cfg, self.updates_per_epoch, self.device = cfg, updates_per_epoch, device
        mixing = cfg.augment.mixup > 0 or cfg.augment.cutmix > 0
        self.mixup = mixing and Mixup(
            mixup_alpha=cfg.augment.mixup,
            cutmix_alpha=cfg.augment.cutmix,
            prob=cfg.augment.mixup_prob,
            switch_prob=cfg.augment.mixup_switch_prob,
            mode=cfg.augment.mixup_mode,
            label_smoothing=cfg.augment.smoothing,
            num_classes=num_classes,
            multi_label=multi_label,
        )
        self.erase = cfg.augment.re_prob > 0 and RandomErasing(
            cfg.augment.re_prob, mode=cfg.augment.re_mode, max_count=cfg.augment.re_count, device=device
        )
        model = model.to(device)
        if cfg.trainer.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if cfg.trainer.grad_checkpointing:
            model.set_grad_checkpointing(True)
        exits, weights = getattr(model, "num_exits", 1), cfg.exits.weights
        if weights is not None and exits != len(weights):
            how = f"has {exits} exits: give a weight for each" if exits > 1 else "has one exit: leave it out"
            raise UserError(f"exits.weights={list(weights)} has no meaning, since {cfg.model} {how}.")
        self.sharded = distributed.world_size() > 1 and cfg.trainer.parallel == "fsdp"
        loss = loss or create_classification_loss(
            multi_label=multi_label, smoothing=cfg.augment.smoothing, soft_targets=bool(mixing)
        )
        if exits > 1:
            if teacher:
                raise UserError(
                    f"{cfg.model} has {exits} exits, of which the last teaches the others: leave out distill.teacher."
                )
            model.set_exit_training()
            divergence = 0.0 if multi_label else cfg.exits.distill  # which is for classes that exclude each other
            loss = ExitLoss(loss, weights or [1.0] * exits, divergence)
        if teacher:
            self.task = distillation.make_task(cfg, model, teacher, loss, device)
        else:
            make_task = MultiLabelClassificationTask if multi_label else ClassificationTask
            self.task = make_task(model, loss, device=device, verbose=False)
        trained = self.task.trainable_module  # the model, with the projection of its features if a teacher needs one
        if cfg.trainer.ema_decay is not None:
            decay, warmup = cfg.trainer.ema_decay, cfg.trainer.ema_warmup
            ema = ModelEmaV3(trained, decay=decay, use_warmup=warmup, foreach=not self.sharded)
            self.task.trainable_module_ema = ema
            if self.sharded:
                shard(ema.module)
        if self.sharded:
            shard(trained)
        self.optimizer = self._create_optimizer(trained)
        if cfg.trainer.compile:
            self.task.compile()
        if distributed.world_size() > 1 and not self.sharded:
            self.task.prepare_distributed(device_ids=[device] if device.type == "cuda" else None)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.AMP[cfg.trainer.amp.lower()] == "float16")
        schedule = OmegaConf.to_container(cfg.schedule)
        if schedule["warmup_epochs"] > cfg.trainer.epochs / 2:
            schedule["warmup_epochs"] = half = cfg.trainer.epochs / 2
            log.info("The warm-up is shortened to half of the training: %g of %g epochs.", half, cfg.trainer.epochs)
        try:
            self.scheduler, self.epochs = create_scheduler_v2(
                self.optimizer,
                num_epochs=cfg.trainer.epochs,
                step_on_epochs=False,
                updates_per_epoch=updates_per_epoch,
                **schedule,
            )
        except (ArithmeticError, AssertionError, TypeError, ValueError) as error:
            raise UserError(
                f"the schedule can't be created from schedule={schedule}: {one_line(error, 300)}"
            ) from error
        if self.scheduler is None:  # which would apply the layer decay
            for group in self.optimizer.param_groups:
                group["lr"] *= group.get("lr_scale", 1.0)

    def _create_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        cfg = self.cfg.optim
        self.lr = cfg.lr if cfg.lr is not None else 2e-4 if self.cfg.pretrained else 1e-3
        extra = {name: cfg[name] for name in ("betas", "eps") if cfg[name] is not None}
        if factors := lr_factors.checked(self.cfg, self.lr):
            # timm's groups, which it would make itself from the model, further split.
            groups = lr_factors.split(param_groups(model, cfg), model, self.lr, factors)
            extra["param_group_fn"] = lambda _: groups
        try:
            return create_optimizer_v2(
                model,
                opt=cfg.opt,
                lr=self.lr,
                weight_decay=cfg.weight_decay,
                momentum=cfg.momentum,
                layer_decay=cfg.layer_decay,
                **extra,
            )
        except Exception as error:  # raised by many optimizers, and by packages that some of them need
            raise UserError(f"the optimizer can't be created from optim={dict(cfg)}: {one_line(error, 300)}") from error

    def mix(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix and erase a batch: with Mixup, labels (B,) become the shares of the classes, (B, classes)."""
        if self.mixup:
            images, labels = self.mixup(images, labels)
        return self.erase(images) if self.erase else images, labels

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Mix and erase normalized images (B, C, H, W) with labels, and return the task's `loss` and `output`.

        A model that needs a further loss has a method `auxiliary_loss()`, which returns that of its last forward pass.
        Of a model with several exits, `output` is that of the last one.
        """
        images, labels = self.mix(images, labels)
        with autocast(self.cfg.trainer.amp, self.device):
            result = self.task(images, labels)
        if isinstance(result["output"], tuple):  # of all exits
            result["output"] = result["output"][-1]
        further = getattr(distillation.trained_model(self.task.trainable_module), "auxiliary_loss", None)
        return result if further is None else result | {"loss": result["loss"] + further()}

    def train_mode(self) -> None:
        """Set training mode, except for frozen modules."""
        self.task.train()
        freezing.keep_frozen(unwrap_model(self.task.trainable_module))

    def accumulating(self, last: bool) -> AbstractContextManager:
        """The context of one of several passes before a step: only the last pass exchanges gradients."""
        return nullcontext() if last or self.sharded else self.task.no_sync()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of `loss`."""
        self.scaler.scale(loss).backward()

    def step(self) -> None:
        """Clip the gradients and step the optimizer."""
        cfg = self.cfg.optim
        if cfg.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            parameters = list(self.task.get_clip_parameters(exclude_head=cfg.clip_mode == "agc"))
            dispatch_clip_grad(parameters, value=cfg.clip_grad, mode=cfg.clip_mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def end_update(self, number: int, stepped: bool) -> None:
        """Finish update number `number`, from 1: clear gradients, and advance the schedule and the averaged weights."""
        self.optimizer.zero_grad(set_to_none=True)
        if stepped:
            self.task.update_ema(step=number)
        self.set_schedule(number)

    def set_schedule(self, number: int) -> None:
        """Set the learning rate that follows update `number`.

        A model that changes in training has a method `set_epoch(epoch)`, which is told how far training has come.
        """
        if self.scheduler:
            self.scheduler.step_update(number)
        set_epoch = getattr(unwrap_model(self.task.trainable_module), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(number / self.updates_per_epoch)

    def eval_model(self) -> nn.Module:
        """The model to evaluate: with averaged weights if there are any, and the same BatchNorm in all processes."""
        ema = self.task.get_trainable_module(ema=True)
        for module in (self.task.trainable_module, ema):
            if module is not None:
                distributed.average_batchnorm(module)
        model = self.task.get_eval_model(ema=ema is not None)
        # Processes have different numbers of batches, and DDP's forward pass would wait for all of them.
        return model.module if isinstance(model, DistributedDataParallel) else model

    def _modules(self) -> tuple[nn.Module, nn.Module | None]:
        ema = self.task.get_trainable_module(ema=True)
        return unwrap_model(self.task.trainable_module), ema.module if ema else None

    def _model_state(self, model: nn.Module) -> dict[str, Any]:
        if self.sharded:
            return sharded_state.get_model_state_dict(model, options=_FULL)
        return model.state_dict()

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights to evaluate, unsharded, on the CPU. If they are sharded, all processes have to call this."""
        model, ema = self._modules()
        state = self._model_state(distillation.trained_model(ema or model))
        return {name: value.detach().cpu().contiguous() for name, value in state.items()}

    def state_dict(self) -> dict[str, Any]:
        """The state for `load_state_dict`. If the weights are sharded, all processes have to call this."""
        model, ema = self._modules()
        if self.sharded:
            optimizer = sharded_state.get_optimizer_state_dict(model, self.optimizer, options=_FULL)
        else:
            optimizer = self.optimizer.state_dict()
        return {
            "model": self._model_state(model),
            "ema": self._model_state(ema) if ema else None,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state that `state_dict` returned."""
        model, ema = self._modules()
        if self.sharded:
            options = sharded_state.StateDictOptions(full_state_dict=True)
            sharded_state.set_model_state_dict(model, state["model"], options=options)
            sharded_state.set_optimizer_state_dict(model, self.optimizer, state["optimizer"], options=options)
            if ema:
                sharded_state.set_model_state_dict(ema, state["ema"], options=options)
        else:
            model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if ema:
                ema.load_state_dict(state["ema"])
        self.scaler.load_state_dict(state["scaler"])


def param_groups(model: nn.Module, cfg: OptimConfig) -> list[dict[str, Any]]:
    """timm's parameter groups for the weight decay and the layer decay of `cfg`."""
    listed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    if cfg.layer_decay is None:
        return param_groups_weight_decay(model, cfg.weight_decay, no_weight_decay_list=listed)
    return param_groups_layer_decay(model, cfg.weight_decay, listed, layer_decay=cfg.layer_decay)


def autocast(amp: str, device: torch.device) -> AbstractContextManager:
    """The context of a forward pass in the mixed precision that `trainer.amp` names."""
    dtype = config.AMP[amp.lower()]
    return torch.autocast(device.type, dtype=getattr(torch, dtype)) if dtype else nullcontext()


def shard(model: nn.Module) -> None:
    """Shard `model` over all processes with FSDP2: every block of a list or sequence, and then the rest as a whole."""
    for parent in reversed(list(model.modules())):
        if isinstance(parent, nn.Sequential | nn.ModuleList):
            for block in parent.children():
                if any(True for _ in block.children()) and any(True for _ in block.parameters()):
                    fully_shard(block)
    fully_shard(model)
