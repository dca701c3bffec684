"""MMEngine's Runner for a run's settings.

MMEngine counts iterations, which are forward passes of each process; an update takes `accumulate` of them. The
schedule counts updates.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config as MMConfig
from mmengine.hooks import EarlyStoppingHook, EMAHook, RuntimeInfoHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from zoo.messages import UserError, one_line
from zoo.recipes import config, distributed, lr_factors
from zoo.recipes.dense.data import Data
from zoo.recipes.dense.mm_keys import override_runner
from zoo.recipes.dense.pipelines import pipelines
from zoo.recipes.dense.samplers import SeededBatchSampler, load
from zoo.recipes.dense.settings import SCOPES, RunLength, finds_masks, learning_rate


def runner_config(
    cfg: DictConfig,
    data: Data,
    length: RunLength | None,
    work_dir: Path,
    device: torch.device,
) -> MMConfig:
    """The configuration of MMEngine's Runner, without the model; `mm` in `cfg` overrides it.

    Without a `length`, the Runner only evaluates.

    Raises:
        UserError: `mm` does not fit.
    """
    masks = cfg.task != "segment" and finds_masks(cfg)
    train, test = pipelines(cfg, masks)
    batch, workers = cfg.trainer.batch_size, distributed.check_open_files(_workers(cfg))
    loading = dict(batch_size=batch, num_workers=workers, persistent_workers=workers > 0)
    evaluated = dict(
        dataset=data.val.dataset(test, training=False),
        sampler=dict(type="DefaultSampler", shuffle=False),
        **loading,
    )
    if cfg.task == "segment" and not cfg.dense.small:
        evaluated["batch_size"] = 1  # mmseg needs images of one size in a test batch
    result = MMConfig(
        dict(
            work_dir=str(work_dir),
            experiment_name=str(work_dir),  # otherwise runners made in the same second share a visualizer
            default_scope=SCOPES[cfg.task],
            val_dataloader=evaluated,
            val_cfg=dict(type="ValLoop"),
            val_evaluator=data.val.metrics(masks),
            # The run saves its own checkpoints, and steps the schedule once per update.
            default_hooks=dict(
                runtime_info=dict(type="BriefRuntimeInfoHook"), logger=None, checkpoint=None, param_scheduler=None
            ),
            log_level="ERROR",
            randomness=dict(seed=cfg.seed, deterministic=cfg.trainer.deterministic),
            launcher="pytorch" if distributed.world_size() > 1 else "none",
            model_wrapper_cfg=dict(type="MMDistributedDataParallel", find_unused_parameters=False)
            | ({} if device.type != "cpu" else dict(device_ids=None)),
            env_cfg=dict(cudnn_benchmark=False, mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0)),
        )
    )
    if length is not None:
        result.merge_from_dict(
            dict(
                train_dataloader=dict(
                    dataset=data.train.dataset(train, training=True),
                    sampler=dict(type="InfiniteSampler", shuffle=True, seed=cfg.seed),
                    batch_sampler=dict(type="OrientedBatchSampler") if cfg.task != "segment" else None,
                    **loading,
                ),
                train_cfg=dict(
                    type="IterBasedTrainLoop",
                    max_iters=length.updates * length.accumulate,
                    val_interval=length.evaluate_every * length.accumulate,
                ),
                optim_wrapper=_optimizer(cfg, length, device),
                param_scheduler=_schedule(cfg, length),
            )
        )
    override_runner(result, OmegaConf.to_container(cfg.mm, resolve=True), SCOPES[cfg.task], masks)
    if length is not None:
        _refuse_hooks(result)
        loader = result.train_dataloader
        loader.batch_sampler = dict(
            type="SeededBatchSampler",
            seed=cfg.seed,
            accumulate=length.accumulate,
            batches=loader.get("batch_sampler"),
            drop_last=loader.pop("drop_last", False),
        )
    if cfg.task == "segment":
        confusion = dict(type="Confusion", classes=len(data.classes), ignore_index=data.ignore_index)
        result.val_evaluator = [result.val_evaluator, confusion]
    return result


def _refuse_hooks(settings: MMConfig) -> None:
    """Refuse hooks that the run would not know of: it would save other weights than it evaluates, or train on."""
    hooks = settings.get("custom_hooks")
    for hook in hooks if isinstance(hooks, list) else ():
        kind = HOOKS.get(str(hook.get("type"))) if isinstance(hook, dict) else None
        for refused, key in ((EMAHook, "trainer.ema_decay"), (EarlyStoppingHook, "trainer.patience")):
            if inspect.isclass(kind) and issubclass(kind, refused):
                raise UserError(f"mm.custom_hooks has {hook['type']}, which a run does not know of: use {key}.")


def _optimizer(cfg: DictConfig, length: RunLength, device: torch.device) -> dict[str, Any]:
    optim = cfg.optim
    optimizer = dict(type=optim.opt, lr=learning_rate(cfg), weight_decay=optim.weight_decay, momentum=optim.momentum)
    optimizer |= {
        name: list(optim[name]) if name == "betas" else optim[name] for name in ("betas", "eps") if optim[name]
    }
    wrapper = dict(
        type="SkipBadLossOptimWrapper",
        constructor="TimmOptimWrapperConstructor",
        optimizer=optimizer,
        paramwise_cfg=dict(
            layer_decay=optim.layer_decay,
            no_decay=None if cfg.dense.no_decay is None else list(cfg.dense.no_decay),
            backbone_lr=cfg.dense.backbone_lr,
            lr_factors=lr_factors.checked(cfg, learning_rate(cfg)),
        ),
        accumulative_counts=length.accumulate,
    )
    if optim.clip_grad is not None:
        wrapper["clip_grad"] = dict(max_norm=optim.clip_grad)
    dtype = config.AMP[cfg.trainer.amp.lower()]
    if dtype:
        if device.type == "cpu":
            raise UserError(
                f"trainer.amp={cfg.trainer.amp} can't be used with task={cfg.task} on a CPU: leave it out there."
            )
        wrapper |= dict(type="SkipBadLossAmpOptimWrapper", dtype=dtype)
    return wrapper


def _schedule(cfg: DictConfig, length: RunLength) -> list[dict[str, Any]]:
    """The learning rate schedule, counted in updates, although MMEngine calls them iterations."""
    schedule, end = cfg.schedule, length.updates
    warmup = min(cfg.dense.warmup_updates, end)
    parts: list[dict[str, Any]] = []
    if warmup > 1:  # the last update of the warm-up has the full learning rate
        parts.append(dict(type="LinearLR", start_factor=cfg.dense.warmup_factor, by_epoch=False, begin=0, end=warmup))
    if schedule.sched == "multistep":
        milestones = [epoch * length.per_epoch for epoch in schedule.decay_milestones]
        parts.append(
            dict(type="MultiStepLR", by_epoch=False, begin=0, end=end, milestones=milestones, gamma=schedule.decay_rate)
        )
    elif warmup == end:
        pass  # the run ends with the warm-up
    elif schedule.sched == "poly":
        parts.append(
            dict(
                type="PolyLR", by_epoch=False, begin=warmup, end=end, power=schedule.decay_rate, eta_min=schedule.min_lr
            )
        )
    elif schedule.sched == "cosine":
        parts.append(dict(type="CosineAnnealingLR", by_epoch=False, begin=warmup, end=end, eta_min=schedule.min_lr))
    return parts


def _workers(cfg: DictConfig) -> int:
    """The number of workers: 0 for the small models of the demo, since starting one takes seconds."""
    if cfg.data.num_workers is not None:
        return cfg.data.num_workers
    return 0 if cfg.dense.small else distributed.spare_cores()


@contextmanager
def mm_errors(cfg: DictConfig) -> Iterator[None]:
    """Turn MMEngine's errors about `mm` into a UserError; most of them are raised when the Runner starts."""
    try:
        yield
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = str(error.args[0] if error.args else error)
        unknown = isinstance(error, KeyError) and " registry" in reason
        if not unknown and not cfg.mm.keys() - {"model"}:
            raise
        reason = one_line(reason.partition(" Please check")[0], 300)
        raise UserError(
            f"mm can't be used ({reason}): correct it. Every `type` in it has to be a registered name."
        ) from error


def build_loader(*args: Any, **kwargs: Any) -> DataLoader:
    """The loader that `Runner.build_dataloader` builds; in training, it seeds each batch."""
    loader = Runner.build_dataloader(*args, **kwargs)
    if isinstance(loader.batch_sampler, SeededBatchSampler):
        dataset: Any = loader.dataset
        dataset.__getitems__ = partial(load, dataset)  # which torch calls with a batch of the sampler
    return loader


def make_runner(settings: Any, model: torch.nn.Module | dict[str, Any]) -> Runner:
    """MMEngine's Runner for `settings` and `model`."""
    known = inspect.signature(Runner).parameters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _Runner(model=model, cfg=settings, **{key: settings[key] for key in settings if key in known})


@HOOKS.register_module()
class BriefRuntimeInfoHook(RuntimeInfoHook):
    """MMEngine's hook, which does not format the configuration for its message hub, where nothing reads it."""

    def before_run(self, runner: Runner) -> None:
        """Begin outside of the loops."""
        self.last_loop_stage = None


class _Runner(Runner):
    """MMEngine's Runner, which resumes through `restore`."""

    restore: Callable[[Runner], None] = staticmethod(lambda runner: None)

    def load_or_resume(self) -> None:
        self.restore(self)

    @staticmethod
    def build_dataloader(*args: Any, **kwargs: Any) -> DataLoader:
        return build_loader(*args, **kwargs)

    def dump_config(self) -> None:
        """Skip this: the run folder has the configuration."""

    def build_visualizer(self, visualizer: Any = None) -> Visualizer:
        """The visualizer of `mm`, or one without a back end, which would format and write the configuration again."""
        return super().build_visualizer(visualizer or Visualizer.get_instance(self.experiment_name))

    def _log_env(self, env_cfg: dict[str, Any]) -> None:
        """Skip this: it is below the level that is shown, and formatting the configuration takes time."""
