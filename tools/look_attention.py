"""What models attend to: the keys of a query, attention rollout, the effective receptive field.

In shapes, H and W are the sides of a map of tokens, h and w those of a map of keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.attention_maps import AttentionInfo, attention, attention_matrix, info
from zoo.messages import UserError


@dataclass
class AttentionModule:
    """An attention module of a model.

    Attributes:
        stage: The number of its stage, from 1.
        block: The number of its block, from 1.
        module: The module.
        info: What the module attends to.
        args: Its inputs, after `run`.
        size: The sides of its stage's map, after `run`. Inputs may be larger, with padding.
    """

    stage: int
    block: int
    module: nn.Module
    info: AttentionInfo
    args: tuple[Tensor, ...] = ()
    size: tuple[int, ...] = ()


@dataclass
class Keys:
    """The keys in the picture that one query attends to.

    Attributes:
        stage: The number of the stage, from 1.
        block: The number of the block, from 1.
        kind: The kind of attention, in words.
        weights: The weights (h, w), averaged over heads. They sum to 1 - `padding`. Of weights that can be negative,
            these are the shares of the absolute values.
        padding: The weight of keys outside the picture, or of a class token.
        pixels: The side of a key in the picture, in pixels.
        what: What the weights are, in words.
    """

    stage: int
    block: int
    kind: str
    weights: Tensor
    padding: float
    pixels: int
    what: str


def attention_modules(model: nn.Module, name: str) -> list[AttentionModule]:
    """The attention modules of a model of zoo, in the order in which they run.

    Attention after the blocks of a stage counts as part of its last block; that before them is left out.

    Raises:
        UserError: The model has none.
    """
    found = []
    for i, stage in enumerate(getattr(model, "stages", ()), 1):
        blocks = getattr(stage, "blocks", ())
        numbers = {module: j for j, block in enumerate(blocks, 1) for module in block.modules()}
        number = 0  # before the blocks
        for module in stage.modules():
            number = numbers.get(module, number)
            if number and (described := info(module)) is not None:
                found.append(AttentionModule(i, number, module, described))
    if not found:
        raise UserError(
            f"{name} has no attention module of zoo: use zoo-look cam or zoo-look field, which take any model of timm."
        )
    return found


def run(model: nn.Module, images: Tensor, found: Sequence[AttentionModule]) -> None:
    """Run the model, and store the inputs and map sizes of the attention modules `found`."""

    def keep_args(site: AttentionModule) -> Callable[..., None]:
        return lambda _, args: setattr(site, "args", args)

    def keep_size(site: AttentionModule) -> Callable[..., None]:
        return lambda _, __, out: setattr(site, "size", tuple(model.feature(out).shape[2:]))

    hooks = []
    for site in found:
        hooks.append(site.module.register_forward_pre_hook(keep_args(site)))
        hooks.append(model.stages[site.stage - 1].register_forward_hook(keep_size(site)))
    try:
        with torch.no_grad():
            model.forward_features(images)
    finally:
        for hook in hooks:
            hook.remove()


def keys(
    model: nn.Module, name: str, images: Tensor, pixel: tuple[int, int], block: int | None = None
) -> Iterator[Keys]:
    """What the token at a pixel attends to, in each stage and each kind of attention.

    Args:
        model: A model of zoo.
        name: Its name, for messages.
        images: An image (1, C, H, W).
        pixel: Row and column.
        block: The number of the block in each stage, from 1, or from -1 backwards. None stands for the first block of
            each kind.

    Raises:
        UserError: The model has no attention module of zoo, or no such block.
    """
    found = attention_modules(model, name)
    depths = [len(stage.blocks) for stage in model.stages]
    if block is not None:
        numbers = [block if block > 0 else depth + 1 + block for depth in depths]
        chosen = [site for site in found if site.block == numbers[site.stage - 1]]
        if not chosen:
            raise UserError(
                f"no stage of {name} with attention has a block {block}: its stages have {', '.join(map(str, depths))} "
                "blocks; give a number from 1, or -1 for the last."
            )
    else:
        first = {(site.stage, site.info.groups): site for site in reversed(found)}
        chosen = [site for site in found if first[site.stage, site.info.groups] is site]
    run(model, images, chosen)
    for site in chosen:
        stride = model.feature_info[site.stage - 1]["reduction"]
        # If a model rounds sizes down, the last rows of the picture have no token of their own.
        token = tuple(min(place // stride, side - 1) for place, side in zip(pixel, site.size, strict=True))
        cell = site.info.key_size
        height, width = ((side + cell - 1) // cell for side in site.size)
        place, class_token = token[0] * width + token[1], height * width
        if site.info.class_token == "middle":
            class_token //= 2
        if site.info.class_token:
            token = 0, place + (place >= class_token)
        for kind, weights in zip(site.info.groups, attention(site.module, site.args, [token])[0], strict=True):
            if site.info.signed:
                weights = weights.abs() / weights.abs().sum()
            if site.info.class_token:
                weights = torch.cat((weights[0, :class_token], weights[0, class_token + 1 :])).view(height, width)
            inside = weights[:height, :width]
            padding = max(1 - inside.sum().item(), 0)
            yield Keys(site.stage, site.block, kind, inside, padding, stride * cell, _what(site.info))


def _what(described: AttentionInfo) -> str:
    if described.kernel is not None:
        return "shares of the kernel's absolute weights"
    return "shares of absolute weights" if described.signed else "averaged over heads"


def rollout(model: nn.Module, name: str, images: Tensor, say: Callable[[str], None] = lambda text: None) -> Tensor:
    """Attention rollout: the share of each token in each token of the last block, (H, W, H, W).

    It is a product over all blocks. Each factor is the mean of the attention, averaged over heads, and the identity,
    which stands for the shortcut (Abnar and Zuidema, arXiv 2005.00928).

    Raises:
        UserError: The blocks do not all have the same tokens, with attention between them.
    """
    found = attention_modules(model, name)
    strides = [info["reduction"] for info in model.feature_info]
    if len(set(strides)) > 1:
        raise UserError(
            f"rollout multiplies the attention of all blocks, so their tokens have to be the same, and those of {name} "
            f"have {', '.join(map(str, strides))} pixels: use an isotropic model, or zoo-look keys."
        )
    if any(site.info.signed for site in found):
        raise UserError(
            f"rollout multiplies attention weights, which {name} does not have: use zoo-look keys or zoo-look field."
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

    It is the mean absolute gradient of a sum of the feature's channels with random signs, with respect to the pixels of
    noise images. A plain sum would be constant after a norm.

    Args:
        model: A model that returns a list of feature maps (1, C, H, W).
        channels: The number of channels of the images.
        size: Height and width of the images.
        count: The number of images.
        seed: The seed of images and signs.
        say: Shows the progress.

    Returns:
        A map (H, W) per stage. It sums to 1.

    Raises:
        UserError: A feature does not depend on the image.
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
            raise UserError(f"the central feature of stage {i} does not depend on the image: are the weights damaged?")
    return [total / total.sum() for total in totals]


def extent(field: Tensor, share: float) -> int:
    """The side, in pixels, of the smallest square around the centre of mass that contains `share` of `field`."""
    rows, columns = (torch.arange(side) for side in field.shape)
    middle = [round((field.sum(1 - axis) * places).sum().item()) for axis, places in enumerate((rows, columns))]
    distance = torch.maximum((rows - middle[0]).abs()[:, None], (columns - middle[1]).abs())
    weight = torch.zeros(int(distance.max()) + 1).index_add_(0, distance.flatten(), field.flatten())
    return 2 * int((weight.cumsum(0) < share).sum()) + 1
