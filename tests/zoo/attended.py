"""What the attention of a family's test model attends to, for the family's test to hold against a plain statement."""

import timm
import torch

from zoo.tools import look_attention, look_patterns

SIZE = (75, 91)  # odd sides in most stages, and windows that do not divide them
PIXEL = (70, 40)


def product(rows, columns):
    """All pairs of a row and a column."""
    return {(y, x) for y in rows for x in columns}


def window(place, length, size):
    """The places along an axis that lie in the same window."""
    return [other for other in range(length) if other // size == place // size]


def places(weights):
    """The keys that have a weight, as a set of rows and columns."""
    return set(map(tuple, weights.nonzero().tolist()))


@torch.no_grad()
def check_keys(name, expected):
    """Hold the keys of the blocks of each stage that have attention to those that `expected` gives.

    It is called with the `AttentionModule`, the token's row and column and the sides of the map, and returns the set of
    keys of each group of heads.
    """
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    images = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(5))
    sites = look_attention.attention_modules(model, name)
    look_attention.run(model, images, sites)
    features = model.forward_intermediates(images, intermediates_only=True)
    found = {}
    for block in sorted({site.block for site in sites}):
        for keys in look_attention.keys(model, name, images, PIXEL, block):
            found[keys.stage, keys.block, keys.kind] = keys
    for site in sites:
        size = tuple(features[site.stage - 1].shape[2:])
        token = tuple(min(p // 2 ** (site.stage + 1), side - 1) for p, side in zip(PIXEL, size, strict=True))
        for kind, keys in zip(site.info.groups, expected(site, token, size), strict=True):
            assert places(found[site.stage, site.block, kind].weights) == keys, (site.stage, kind)


def patterns(family):
    """The panels of `zoo-look patterns` by title, and the keys in each of their maps."""
    panels = {panel.title: panel for panel in look_patterns.panels([family])}
    return panels, {title: [places(map_) for map_ in panel.maps] for title, panel in panels.items()}
