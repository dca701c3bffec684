"""How the models attend, computed from the modules themselves: keys of a query, rollout, effective receptive field.

Letters: Q queries, G groups of heads, H, W map of tokens, h, w map of keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from zoo import biformer, cswin, gc_vit, litv2, maxvit, nat, van
from zoo.tools.cli import ToolError


@dataclass
class Site:
    """An attention module of a model, and what each of its groups of heads attends to.

    After `run` also its inputs, and the sides of its block's map, which an input may exceed by padding.
    """

    stage: int
    block: int
    module: nn.Module
    kinds: tuple[str, ...]
    args: tuple[Tensor, ...] = ()
    size: tuple[int, ...] = ()


@dataclass
class Keys:
    """What one query attends to: `weights` (h, w), averaged over heads, of the keys on the picture.

    Attributes:
        stage, block: Where, from 1 on.
        kind: Which attention it is, in words.
        weights: They sum to 1 less `padding`.
        padding: What goes to keys beside the picture.
        pixels: Sides of a key on the picture, in pixels.
        softmax: Whether they are attention weights; else they are shares of a kernel's absolute weights.
    """

    stage: int
    block: int
    kind: str
    weights: Tensor
    padding: float
    pixels: int
    softmax: bool


def _routed(module: biformer.RoutedAttention) -> tuple[str, ...]:
    regions = module.num_regions
    return (f"{min(module.topk, regions**2)} of {regions} x {regions} regions",)


def _neighborhood(module: nat.NeighborhoodAttention) -> tuple[str, ...]:
    dilated = f", dilated by {module.dilation}" if module.dilation > 1 else ""
    return (f"{module.kernel_size} x {module.kernel_size} neighbours{dilated}",)


# By class: what the groups of heads attend to, in the order of their channels.
KINDS: dict[type[nn.Module], Callable[..., tuple[str, ...]]] = {
    nat.NeighborhoodAttention: _neighborhood,
    nat.GlobalAttention: lambda module: ("all tokens",),
    cswin.CrossShapedAttention: lambda module: tuple(f"stripes, {module.split_size} {n}" for n in ("wide", "high")),
    cswin.GlobalAttention: lambda module: ("all tokens",),
    maxvit.WindowAttention: lambda module: ("{} of {} x {}".format(module.layout, *module.window_size),),
    biformer.RoutedAttention: _routed,
    biformer.GrowingRoutedAttention: _routed,
    biformer.GlobalAttention: lambda module: ("all tokens",),
    gc_vit.WindowAttention: lambda module: (
        f"window of {module.window_size} x {module.window_size}" + ", global query" * module.use_global_query,
    ),
    litv2.HiFiAttention: lambda module: (f"Hi-Fi, window of {module.window_size} x {module.window_size}",),
    litv2.LoFiAttention: lambda module: (
        f"Lo-Fi, means of {module.window_size} x {module.window_size}" if module.window_size > 1 else "all tokens",
    ),
    van.LargeKernelAttention: lambda module: ("large kernel",),
}


def attention(module: nn.Module, args: Sequence[Tensor], tokens: Sequence[tuple[int, int]]) -> Tensor:
    """The weights with which chosen tokens attend to the keys, from the module's own output.

    The output before its last linear layer is the weighted sum of the values. So its derivative by a value is the
    weight, whatever the operator and its implementation, channel by channel. LePE, a convolution of the values that is
    added, is set to zero for this.

    Args:
        module: One of the classes in KINDS.
        args: Its inputs for one image: tokens (1, H, W, C), of VAN (1, C, H, W); and what else it takes.
        tokens: Rows and columns of the Q queries.

    Returns:
        (Q, G, h, w), averaged over the heads of a group. The map of keys is that of the tokens with its padding at the
        bottom and the right if it is padded ahead of the linear layer; of Lo-Fi attention it is that of the averages.
        Of VAN it is the share of each token in the absolute weights of the two convolutions, over all channels.
    """
    rows, columns = torch.tensor(tokens).unbind(1)
    count = torch.arange(len(tokens))
    args = tuple(x.detach().expand(len(tokens), *x.shape[1:]) for x in args)
    with torch.enable_grad():
        if _is_kernel(module):
            x = args[0].clone().requires_grad_()
            gate = module.dw_dilated_conv(module.dw_conv(x))[count, :, rows, columns]
            share = torch.autograd.grad(gate.sum(), x)[0].abs().sum(1, keepdim=True)
            return share / share.sum((2, 3), keepdim=True)
        values = []

        def watch_values(qkv: Tensor) -> Tensor:
            values.append(qkv.detach().requires_grad_())
            return values[-1]

        out = _weighted_sum(module, args, watch_values)
        weights = torch.autograd.grad(out[count, rows, columns].sum(), values[0])[0][..., -out.shape[-1] :]
    return weights.unflatten(-1, (len(KINDS[type(module)](module)), -1)).mean(-1).permute(0, 3, 1, 2)


@torch.no_grad()
def attention_matrix(module: nn.Module, args: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """The weights with which all tokens attend to all, averaged over heads: (H W, H W), queries by keys.

    What `attention` gives of all tokens, much faster. The values are set to one at a single token, another one in each
    channel of a head: then the weighted sum is the weights of as many keys as a head has channels.

    Args:
        module: One of the classes in KINDS with a single group of heads, whose keys are its tokens.
        args: Its inputs for one image, as for `attention`.
        size: The sides of the map of tokens, H and W, without padding.
    """
    heads, head_dim = module.num_heads, args[0].shape[-1] // module.num_heads
    parts = []
    for keys in torch.arange(size[0] * size[1]).split(head_dim):

        def set_values(qkv: Tensor, keys: Tensor = keys) -> Tensor:
            values = qkv.new_zeros(*qkv.shape[1:3], heads, head_dim)
            values[keys // size[1], keys % size[1], :, torch.arange(len(keys))] = 1
            return torch.cat((qkv[..., : -heads * head_dim], values.flatten(2)[None]), -1)

        out = _weighted_sum(module, args, set_values)[0, : size[0], : size[1]]
        parts.append(out.unflatten(-1, (heads, head_dim)).mean(2)[..., : len(keys)])
    return torch.cat(parts, -1).flatten(0, 1)


def _weighted_sum(module: nn.Module, args: Sequence[Tensor], change: Callable[[Tensor], Tensor]) -> Tensor:
    """What goes into the last linear layer, with `change` of what the first gives, whose last channels are the values.

    LePE is left out.
    """
    outputs: list[Tensor] = []
    hooks = [
        (module.kv if hasattr(module, "kv") else module.qkv).register_forward_hook(lambda _, __, qkv: change(qkv)),
        module.proj.register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0])),
    ]
    silent = {name: torch.zeros_like(x) for name, x in module.named_parameters() if name.startswith("lepe.")}
    try:
        functional_call(module, silent, tuple(args))
    finally:
        for hook in hooks:
            hook.remove()
    return outputs[0]


def _is_kernel(module: nn.Module) -> bool:
    return isinstance(module, van.LargeKernelAttention)


def sites(model: nn.Module, name: str) -> list[Site]:
    """The attention modules of one of zoo's models, in the order in which they run.

    Raises:
        ToolError: it is another's.
    """
    found = [
        Site(i, j, module, KINDS[type(module)](module))
        for i, stage in enumerate(getattr(model, "stages", ()), 1)
        for j, block in enumerate(getattr(stage, "blocks", ()), 1)
        for module in block.modules()
        if type(module) in KINDS
    ]
    if not found:
        raise ToolError(f"{name} has no attention of zoo's: zoo-look cam and zoo-look field take any model of timm.")
    return found


def run(model: nn.Module, images: Tensor, found: Sequence[Site]) -> None:
    """Run the model, and keep with each site what it got."""

    def keep_args(site: Site) -> Callable[..., None]:
        return lambda _, args: setattr(site, "args", args)

    def keep_size(site: Site, sides: slice) -> Callable[..., None]:
        return lambda _, __, out: setattr(site, "size", tuple(out.shape[sides]))

    hooks = []
    for site in found:
        stage = model.stages[site.stage - 1]
        sides = slice(1, 3) if stage.channels_last else slice(2, 4)
        hooks.append(site.module.register_forward_pre_hook(keep_args(site)))
        hooks.append(stage.blocks[site.block - 1].register_forward_hook(keep_size(site, sides)))
    try:
        with torch.no_grad():
            model.forward_features(images)
    finally:
        for hook in hooks:
            hook.remove()


def keys(
    model: nn.Module, name: str, images: Tensor, pixel: tuple[int, int], block: int | None = None
) -> Iterator[Keys]:
    """What the token at a pixel attends to, in each stage and each way.

    Args:
        model: One of zoo's.
        name: Its name, for messages.
        images: (1, C, H, W).
        pixel: Row and column.
        block: Which block of each stage, from 1 on, or from the end if it is negative; if None, the first block of
            each kind.

    Raises:
        ToolError: it has no such attention or block.
    """
    found = sites(model, name)
    depths = [len(stage.blocks) for stage in model.stages]
    if block is not None:
        numbers = [block if block > 0 else depth + 1 + block for depth in depths]
        chosen = [site for site in found if site.block == numbers[site.stage - 1]]
        if not chosen:
            raise ToolError(
                f"no stage of {name} with attention has a block {block}: its stages have {', '.join(map(str, depths))} "
                "blocks; give a number from 1 on, or -1 for the last."
            )
    else:
        first = {(site.stage, site.kinds): site for site in reversed(found)}
        chosen = [site for site in found if first[site.stage, site.kinds] is site]
    run(model, images, chosen)
    for site in chosen:
        stride = model.feature_info[site.stage - 1]["reduction"]
        # Where a model rounds down, the picture's last rows have no token of their own.
        token = tuple(min(place // stride, side - 1) for place, side in zip(pixel, site.size, strict=True))
        cell = site.module.window_size if isinstance(site.module, litv2.LoFiAttention) else 1
        height, width = ((side + cell - 1) // cell for side in site.size)
        for kind, weights in zip(site.kinds, attention(site.module, site.args, [token])[0], strict=True):
            inside = weights[:height, :width]
            padding = max(1 - inside.sum().item(), 0)
            yield Keys(site.stage, site.block, kind, inside, padding, stride * cell, not _is_kernel(site.module))


def rollout(model: nn.Module, name: str, images: Tensor, say: Callable[[str], None] = lambda text: None) -> Tensor:
    """Attention rollout: how much of each token is in each token of the last block, (H, W, H, W).

    The attention of all blocks, averaged over heads, half of each replaced by the identity for the shortcut, multiplied
    (Abnar and Zuidema, arXiv 2005.00928).

    Raises:
        ToolError: the model's blocks do not all have the same tokens and attention between them.
    """
    found = sites(model, name)
    strides = [info["reduction"] for info in model.feature_info]
    if len(set(strides)) > 1:
        raise ToolError(
            f"rollout multiplies the attention of all blocks, so their tokens have to be the same, and those of {name} "
            f"have {', '.join(map(str, strides))} pixels: take an isotropic model, or zoo-look keys."
        )
    run(model, images, found)
    height, width = found[0].size
    identity = torch.eye(height * width)
    total = identity
    for number, site in enumerate(found, 1):
        say(f"block {number} of {len(found)}")
        total = (attention_matrix(site.module, site.args, (height, width)) + identity) / 2 @ total
    return total.unflatten(1, (height, width)).unflatten(0, (height, width))


def field(
    model: nn.Module,
    channels: int,
    size: Sequence[int],
    count: int,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> list[Tensor]:
    """The effective receptive field of each stage's central feature (Luo et al., arXiv 1701.04128).

    It is the mean absolute derivative by the pixels of noise images, of a combination of the feature's channels with
    random signs: their plain sum is constant where a norm ends a stage.

    Args:
        model: From images to a list of feature maps (1, C, H, W).
        channels: Of the images.
        size: Their height and width.
        count: How many.
        seed: Of images and signs.
        say: Gets the progress.

    Returns:
        A map (H, W) per stage, which sums to 1.

    Raises:
        ToolError: a feature does not depend on the image.
    """
    generator = torch.Generator().manual_seed(seed)
    totals: list[Tensor] = []
    for number in range(count):
        say(f"image {number + 1} of {count}")
        images = torch.randn(1, channels, *size, generator=generator).requires_grad_()
        with torch.enable_grad():
            features = model(images)
            for i, x in enumerate(features):
                signs = torch.randint(2, (x.shape[1],), generator=generator) * 2.0 - 1
                centre = x[0, :, x.shape[2] // 2, x.shape[3] // 2]
                (grad,) = torch.autograd.grad(centre @ signs, images, retain_graph=i < len(features) - 1)
                grad = grad[0].abs().sum(0)
                totals[i:] = [totals[i] + grad, *totals[i + 1 :]] if number else [grad]
    for i, total in enumerate(totals, 1):
        if not total.sum() > 0:
            raise ToolError(f"the central feature of stage {i} does not depend on the image: are the weights in order?")
    return [total / total.sum() for total in totals]


def extent(field: Tensor, share: float) -> int:
    """The side, in pixels, of the smallest square around its centre of mass that holds this share of `field`."""
    rows, columns = (torch.arange(side) for side in field.shape)
    middle = [round((field.sum(1 - axis) * places).sum().item()) for axis, places in enumerate((rows, columns))]
    distance = torch.maximum((rows - middle[0]).abs()[:, None], (columns - middle[1]).abs())
    weight = torch.zeros(int(distance.max()) + 1).index_add_(0, distance.flatten(), field.flatten())
    return 2 * int((weight.cumsum(0) < share).sum()) + 1
