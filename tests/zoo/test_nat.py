"""NAT's and DiNAT's own arguments, keys, and dilations for dense prediction. Some seconds."""

import pytest
import timm
import torch

from zoo import families

from .attended import check_keys, patterns, product
from .test_parity import multiply_adds

DET = [[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7], [1, 3, 1, 3, 1]]
SEG = [[1, 16, 1], [1, 4, 1, 8], [1, 2, 1, 3, 1, 4], [1, 2, 1, 2, 1]]
SEG_640 = [
    [1, 20, 1],
    [1, 5, 1, 10],
    [1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5],
    [1, 2, 1, 2, 1],
]
MASK2FORMER = [
    [1, 14, 1],
    [1, 4, 1, 7],
    [1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 3],
    [1, 1, 1, 1, 1],
]


@pytest.mark.parametrize(
    ("model", "task", "expected"),
    [
        ("dinat_mini", "detect", {"dilations": DET}),
        ("dinat_small.in1k", "detect", {"dilations": DET}),
        ("dinat_base", "segment", {"dilations": SEG}),
        ("dinat_large_384", "detect", {"dilations": DET}),
        ("dinat_large", "segment", {"dilations": SEG_640}),
        ("dinat_large_384_11x11", "segment", {"dilations": MASK2FORMER}),
        ("dinat_large_384_11x11", "detect", {"dilations": MASK2FORMER}),
        ("dinat_s_tiny", "detect", {"dilations": [[1, 28], [1, 14], [1, 3, 1, 5, 1, 7], [1, 3]]}),
        ("dinat_s_small", "segment", {"dilations": [[1, 16], [1, 8], [1, 2, 1, 3, 1, 4], [1, 2]]}),
        ("dinat_s_large_384", "segment", {"dilations": [[1, 20], [1, 10], SEG_640[2], [1, 2]]}),
        ("dinat_isotropic_small", "detect", {}),
        ("nat_mini", "detect", {}),
        ("test_dinat", "detect", {}),
    ],
)
def test_dense_kwargs_are_the_official_codes(model, task, expected):
    assert families.dense_kwargs(model, task) == expected


def neighbors(place, length, dilation):
    """The window of 3 around a place, among those with the same remainder, moved inward at the rim."""
    same = list(range(place % dilation, length, dilation))
    start = min(max(same.index(place) - 1, 0), len(same) - 3)
    return same[start : start + 3]


@pytest.mark.parametrize("name", ["test_nat", "test_dinat"])
def test_keys_are_those_of_the_operator(name):
    def keys(site, token, size):
        dilation = (4, 2, 1, 1)[site.stage - 1] if name == "test_dinat" and site.block == 2 else 1
        return [product(*(neighbors(place, length, dilation) for place, length in zip(token, size, strict=True)))]

    check_keys(name, keys)


def test_patterns():
    _, got = patterns("nat")
    assert got["NAT"] == [product(range(8, 15), range(13, 20)), product(range(21, 28), range(7))]
    assert got["DiNAT"] == [product(range(2, 21, 3), range(7, 26, 3))]


@pytest.mark.slow
@torch.no_grad()
def test_multiply_adds_are_the_papers():
    assert multiply_adds("dinat_tiny") == pytest.approx(4.3, rel=0.02)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": (1, 3, 4, 8)}, r"num_heads=\(1, 3, 4, 8\) for embed_dims=.*divide"),
        ({"kernel_size": 0}, "kernel_size=0; it has to be a whole number from 1 to 1,024"),
        ({"mlp_ratio": 1e6}, "mlp_ratio=1000000.0; it has to be a number from 0 to 100"),
        ({"mlp_ratio": 0}, "mlp_ratio 0 for a stage of 16 channels, which leaves no hidden channels"),
        ({"embed_dims": (1, 2, 4, 8), "num_heads": (1,) * 4}, "the first stage needs 2 channels or more"),
        ({"dilations": ("a",) * 4}, "dilations='a' for a stage of 2 blocks"),
        ({"layout": "isotropic"}, "with layout='isotropic', all stages have the same number of channels"),
    ],
    ids=["heads", "kernel_size", "large_mlp_ratio", "mlp_ratio", "channels", "dilations", "isotropic"],
)
def test_bad_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_dinat", **kwargs)
