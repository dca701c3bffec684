"""The base class of all families: a pyramid of stages between a stem and a classifier, with timm's methods.

Images and features are NCHW, as timm's users expect. Between the blocks of a transformer, tokens are NHWC, as the
operators read them. A stage returns a view of its tokens, so the permutation costs nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from timm.layers import LayerNorm2d, get_device_dtype
from timm.models import build_model_with_cfg, checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from zoo import arguments
from zoo.cpu import channels_last
from zoo.efficient_probing import EfficientProbing, queries_of
from zoo.layers import init_transformer
from zoo.pretrained import FilterFn, resolve_num_classes, with_checked_file

__all__ = ["Backbone", "Stage", "create"]

Model = TypeVar("Model", bound="Backbone")


class Stage(nn.Module):
    """Downsampling, blocks, norm: (B, C, H, W) -> (B, C', H', W').

    Args:
        blocks: Modules that map tokens to tokens.
        downsample: Module that maps the previous stage's output to this stage's channels and size, NCHW; or None.
        norm: Norm of the stage's output, NCHW; or None.
        channels_last: Whether the blocks take and return NHWC.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        downsample: nn.Module | None = None,
        norm: nn.Module | None = None,
        channels_last: bool = True,
    ):
        super().__init__()
        self.grad_checkpointing = False
        self.channels_last = channels_last
        self.downsample = nn.Identity() if downsample is None else downsample
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        x = self.downsample(x)
        if self.channels_last:
            x = self.forward_blocks(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        else:
            x = self.forward_blocks(x)
        return self.norm(x)

    def forward_blocks(self, x: Tensor, *context: Tensor) -> Tensor:
        """Run the blocks, with any further arguments of their attention."""
        for block in self.blocks:
            x = checkpoint(block, x, *context) if self.grad_checkpointing else block(x, *context)
        return x


class Backbone(nn.Module):
    """Images (B, in_chans, H, W), any size from 32 pixels up, to logits (B, num_classes): stem, stages, norm, head.

    Features are the outputs of the stages, NCHW, before `norm`. A family builds the stem and the stages, and calls this
    constructor last: it initialises all parameters.

    Args:
        stem: Module that maps images to the input of the first stage, NCHW. It checks the images.
        stages: The stages. Each maps the features of the previous one to its own.
        dims: Channels of each stage's output.
        in_chans: Channels of the images.
        num_classes: Classes of the linear classifier; 0 for none.
        global_pool: "avg" for average pooling; "ep" for efficient probing (`zoo.efficient_probing`), or "ep8" for it
            with 8 queries; or "" for none.
        drop_rate: Dropout before the classifier.
        strides: Pixels per feature, for each stage; 4, 8, 16, ... if None.
        norm: Applied to the output of the last stage, NCHW; left out if there is an `output_norm`.
        num_features: Channels of the output of `norm`, if they differ from those of the last stage.
        pre_logits: Module between pooling and classifier.
        output_norm: Whether `forward_intermediates` applies a norm to each output; or the stages where it does.
        output_norm_eps: Epsilon of these norms.
        output_norm_layer: The class of these norms, which are NCHW.

    Raises:
        ValueError: An argument is out of range, or `output_norm` is combined with a classifier.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[Stage],
        dims: Sequence[int],
        *,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        strides: Sequence[int] | None = None,
        norm: nn.Module | None = None,
        num_features: int | None = None,
        pre_logits: nn.Module | None = None,
        output_norm: bool | Sequence[int] = False,
        output_norm_eps: float = 1e-5,
        output_norm_layer: Callable[..., nn.Module] = LayerNorm2d,
    ):
        if output_norm and num_classes > 0:
            raise ValueError(
                f"Got output_norm=True with {num_classes} classes; norms of each output are for features_only=True or "
                "num_classes=0."
            )
        super().__init__()
        self.in_chans = in_chans
        self.grad_checkpointing = False
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        strides = [4 * 2**i for i in range(len(dims))] if strides is None else strides
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": dim, "reduction": stride, "module": f"stages.{i}"}
            for i, (dim, stride) in enumerate(zip(dims, strides, strict=True))
        ]
        self.num_features = dims[-1] if num_features is None or output_norm else num_features
        self.head_hidden_size = self.num_features
        self.norm = nn.Identity() if norm is None or output_norm else norm
        self.output_norms: nn.ModuleList | None = None
        if output_norm:
            normed, dd = range(len(dims)) if output_norm is True else output_norm, get_device_dtype(self)
            self.output_norms = nn.ModuleList(
                output_norm_layer(dim, eps=output_norm_eps, **dd) if i in normed else nn.Identity()
                for i, dim in enumerate(dims)
            )
        self.pre_logits = nn.Identity() if pre_logits is None else pre_logits
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        # A model on the meta device has no values to initialise, and visiting its modules takes most of the time.
        if get_device_dtype(self)["device"].type != "meta":
            self.init_weights()

    def init_module(self, module: nn.Module) -> None:
        """Initialise the parameters that `module` itself has."""
        init_transformer(module)

    def init_weights(self) -> None:
        """Initialise every parameter and buffer, as the official code does."""
        probing: set[nn.Module] = set()
        if isinstance(self.head, EfficientProbing):
            self.head.init_weights()
            probing.update(self.head.modules())
        self.apply(lambda module: None if module in probing else self.init_module(module))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """An empty set. timm does not decay vectors (norms, biases, layer scales) anyway."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups for timm's layer-wise decay: one per block, or one per stage if `coarse`."""
        blocks = [
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.norm", (99999,)),  # timm adds parameters with this number to the previous group
            (r"^stages\.(\d+)\.", (0,)),
        ]
        last = (r"^(?:norm|output_norms)\.", (99999,))
        return {"stem": r"^stem\.", "blocks": [(r"^stages\.(\d+)", None), last] if coarse else [*blocks, last]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in backward passes to save memory. Batch norm then updates its statistics twice per step."""
        self.grad_checkpointing = enable
        stage: Any
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The linear classifier, or an identity if there is none."""
        return self.head[-1] if isinstance(self.head, EfficientProbing) else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier with a new one (none if `num_classes` is 0), and the pooling unless it is None.

        Efficient probing keeps its queries and values if `global_pool` is None.
        """
        arguments.check(num_classes=num_classes)
        if global_pool is not None:
            arguments.check(global_pool=global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        dd = get_device_dtype(self)
        self.head: nn.Module
        if arguments.is_ep(self.global_pool):
            if global_pool is None and isinstance(self.head, EfficientProbing):
                self.head.reset_classifier(num_classes)
            else:
                self.head = EfficientProbing(self.num_features, num_classes, queries_of(self.global_pool), **dd)
        else:
            self.head = nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes > 0 else nn.Identity()
            self.head.apply(self.init_module)
        self.head.train(self.training)

    def feature(self, x: Any) -> Tensor:
        """The feature (B, C, H, W) in what a stage returns: all of it, except in a family with a class token."""
        return x

    def final_norm(self, x: Any) -> Any:
        """Apply the norm to what the last stage returns."""
        return self.norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The output of `forward_features` and the features of chosen stages; only the latter if `intermediates_only`.

        Args:
            x: Images (B, in_chans, H, W).
            indices: The stages. An int n means the last n stages, and None all stages.
            norm: Whether to apply the final norm to the features of the last stage.
            stop_early: Whether to stop after the last chosen stage.
            output_fmt: "NCHW".
            intermediates_only: Whether to return the list of features only.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"Got {output_fmt=}; only 'NCHW' is supported: permute the features instead.")
        take, last = feature_take_indices(len(self.stages), indices)
        intermediates = []
        final = len(self.stages) - 1
        x = self.stem(channels_last(x))
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                feature = self.feature(x)
                if self.output_norms is not None:
                    intermediates.append(self.output_norms[i](feature))
                else:
                    intermediates.append(self.norm(feature) if norm and i == final else feature)
        if intermediates_only:
            return intermediates
        return (self.final_norm(x) if last == final or not stop_early else x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last of `indices`, and the final norm and the head if any stage is removed.

        Args:
            indices: The stages to keep. An int n means the last n stages.
            prune_norm: Whether to remove the final norm in any case. A head that no longer fits is removed with it.
            prune_head: Whether to remove the head in any case.

        Returns:
            The indices as non-negative numbers.
        """
        take, last = feature_take_indices(len(self.stages), indices)
        shortened = last + 1 < len(self.stages)
        self.stages = self.stages[: last + 1]
        if self.output_norms is not None:
            self.output_norms = self.output_norms[: last + 1]
        if prune_norm or shortened:
            self.norm = nn.Identity()
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or shortened or self.head_hidden_size != self.num_features:
            self.head_hidden_size = self.num_features
            self.pre_logits = nn.Identity()
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_features, H', W'), after the final norm."""
        return self.final_norm(self.stages(self.stem(channels_last(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, and classify unless `pre_logits`: (B, num_features, H, W) -> (B, num_classes or head_hidden_size)."""
        if isinstance(self.head, EfficientProbing):
            x = self.head_drop(self.pre_logits(self.head.pool.tokens(x)))
            return self.head.forward_pooled(x) if pre_logits else self.head(x)
        if self.global_pool == "avg":
            x = self.pre_logits(x.mean(dim=(2, 3)))
        elif self.num_classes > 0 and not pre_logits:
            raise ValueError(
                f"A classifier of {self.num_classes} classes needs pooled features: use global_pool='avg', "
                "or num_classes=0 for feature maps."
            )
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def create(
    model_cls: type[Model],
    variant: str,
    settings: dict[str, Any],
    pretrained: bool,
    filter_fn: FilterFn,
    **kwargs: Any,
) -> Model:
    """Build a registered model with timm's `build_model_with_cfg`.

    Args:
        model_cls: The family's class.
        variant: The model's name.
        settings: The variant's arguments for `model_cls`.
        pretrained: Whether to load weights.
        filter_fn: The family's `checkpoint_filter_fn`.
        kwargs: The caller's arguments, for `model_cls` and for `build_model_with_cfg`.

    Raises:
        TypeError: An argument is unknown.
        ValueError: An argument is out of range, or the weights can't be used.
    """
    own = list(inspect.signature(model_cls.__init__).parameters)[1:]
    timms = [
        "features_only",
        "out_indices",
        "feature_cls",
        "pruned",
        *inspect.signature(build_model_with_cfg).parameters,
    ]
    for name, value in kwargs.items():
        arguments.check_name(name, value, [*own, *timms], variant)
    depths = kwargs.get("depths")
    stages = len(depths if arguments.is_list(depths) else settings["depths"])
    if "out_indices" in kwargs:
        _check_indices(kwargs["out_indices"], stages)
    kwargs = resolve_num_classes(variant, pretrained, settings | kwargs)
    if pretrained:
        kwargs, filter_fn = with_checked_file(variant, kwargs, filter_fn)
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=filter_fn,
        feature_cfg={
            "out_indices": tuple(range(stages)),
            "feature_cls": "getter",
            "flatten_sequential": True,
        },
        **kwargs,
    )


def _check_indices(indices: Any, stages: int) -> None:
    """Raise ValueError unless `indices` lists stages or is a number of last stages."""
    if arguments.is_list(indices):
        good = len(indices) > 0 and all(arguments.is_number(index, -stages, stages - 1) for index in indices)
    else:
        good = arguments.is_number(indices, 1, stages)
    if not good:
        raise ValueError(
            f"Got out_indices={arguments.shown(indices)}; it has to be a list of stages from 0 to {stages - 1}, or the "
            f"number of the last ones, from 1 to {stages}."
        )
