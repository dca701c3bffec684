"""PPMA's masks, rotation, rows of queries, initialisation and keys. 5 s."""

import pytest
import timm
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zoo import families, ppma
from zoo.kernels import implementation
from zoo.ppma import FullAttention, LineAttention, PathDecay, path_attention

from .attended import check_keys, patterns, product
from .test_parity import multiply_adds


def tokens(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def build(cls, dim=16, num_heads=2):
    torch.manual_seed(0)
    module = cls(dim, num_heads, dtype=torch.float64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def plain_mask(steps):
    """(T, T): minus the sum of the steps on the way from one token of a line to another, without that of the first."""
    size = len(steps)
    ways = [[range(min(i, j) + 1, max(i, j) + 1) for j in range(size)] for i in range(size)]
    return torch.stack([torch.stack([-steps[list(way)].sum() for way in row]) for row in ways])


def turned(x, angles):
    """Pairs of channels as complex numbers, turned by angles."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.exp(1j * angles)).flatten(-2)


def plain_attention(attn, x):
    """The attention of one image (H, W, dim), head by head, by the formulas of the paper."""
    height, width, dim = x.shape
    count, size = attn.num_heads, dim // attn.num_heads
    q, k, v = attn.qkv(x).split(dim, -1)
    lepe = F.conv2d(v.permute(2, 0, 1)[None], attn.lepe.weight, attn.lepe.bias, padding=2, groups=dim)[0]
    numbers = torch.arange(height * width).view(height, width, 1)
    angles = numbers * 10000 ** -torch.linspace(0, 1, size // 2, dtype=torch.float64)
    outs = []
    for head in range(count):
        part = slice(head * size, (head + 1) * size)
        query, key = (turned(t[..., part], angles) for t in (q, k))
        inputs = attn.decay.dt_linear(x[..., part]) + attn.decay.dt_bias[head]
        steps = attn.decay.A_log[head].exp() * F.softplus(inputs)
        rows = torch.stack([plain_mask(steps[y, :, 0]) for y in range(height)])  # (H, W, W)
        columns = torch.stack([plain_mask(steps[:, x_, 1]) for x_ in range(width)])  # (W, H, H)
        value = v[..., part]
        if isinstance(attn, LineAttention):
            by_row = ((query @ key.mT) * size**-0.5 + rows).softmax(-1)
            q_t, k_t = query.transpose(0, 1), key.transpose(0, 1)
            by_column = ((q_t @ k_t.mT) * size**-0.5 + columns).softmax(-1)
            first = (by_column @ (by_row @ value).transpose(0, 1)).transpose(0, 1)
            second = by_row @ (by_column @ value.transpose(0, 1)).transpose(0, 1)
            outs.append((first + second) / 2)
            continue
        mask = torch.empty(height, width, height, width, dtype=torch.float64)
        for y1, x1, y2, x2 in torch.cartesian_prod(*map(torch.arange, mask.shape)).tolist():
            mask[y1, x1, y2, x2] = rows[y1, x1, x2] + columns[x2, y1, y2]
        mask = mask.flatten(2).flatten(0, 1)
        logits = size**-0.5 * query.flatten(0, 1) @ key.flatten(0, 1).mT
        weights = ((logits + mask).softmax(-1) + (logits + mask.T).softmax(-1)) / 2
        outs.append((weights @ value.flatten(0, 1)).view(height, width, size))
    return attn.proj(torch.cat(outs, -1) + lepe.permute(1, 2, 0))


@torch.no_grad()
@pytest.mark.parametrize("cls", [LineAttention, FullAttention])
@pytest.mark.parametrize("size", [(3, 5), (4, 1), (1, 1)], ids=str)
def test_attention_is_the_papers(cls, size):
    attn, x = build(cls), tokens(2, *size, 16)
    torch.testing.assert_close(attn(x), torch.stack([plain_attention(attn, image) for image in x]))


@torch.no_grad()
def test_weights_of_lines_are_the_operators():
    attn = build(LineAttention)
    query_key, value, sums = tokens(2, 3, 4, 32), tokens(2, 3, 4, 16, seed=2), tokens(2, 2, 3, 4, 2, seed=3)
    want = attn.attend_by_weights(query_key, value, *sums)
    for choice in ("reference", "torch"):
        with implementation(choice):
            torch.testing.assert_close(attn.attend_in_windows(query_key, value, *sums), want)


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that is computed."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_rows_of_queries_and_their_gradients(rows, monkeypatch):
    """No mask of all pairs of tokens exists, not even in the backward pass; 7 rows are no multiple of 2 or 3."""
    given = [tokens(2, 7, 6, 4, seed=i) for i in range(3)] + [tokens(2, 7, 6, seed=i) for i in (3, 4)]
    given = [x.requires_grad_() for x in given]
    want = path_attention(*given)  # all rows at once
    grads = torch.autograd.grad(want.square().sum(), given)
    monkeypatch.setattr(ppma, "CPU_BYTES", 8 * 2 * rows * 6 * 7 * 6)
    with Largest() as largest:
        out = path_attention(*given)
        found = torch.autograd.grad(out.square().sum(), given)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(found, grads)
    assert largest.numel == max(2 * rows * 6 * 7 * 6, 2 * 7 * 7 * 6)  # logits, or the decays within columns


@pytest.mark.slow
def test_second_derivative_of_rows(monkeypatch):
    monkeypatch.setattr(ppma, "CPU_BYTES", 1)
    given = [tokens(1, 2, 3, 2, seed=i) for i in range(3)] + [tokens(1, 2, 3, seed=i) for i in (3, 4)]
    assert torch.autograd.gradgradcheck(path_attention, [x.requires_grad_() for x in given])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_stay_in_float32(dtype):
    decay = build(PathDecay).to(dtype)
    x = tokens(1, 40, 50, 16).to(dtype)
    steps = decay.dt_linear(x.unflatten(-1, (2, 8))).float() + decay.dt_bias.float()[:, None]
    steps = -decay.A_log.float().exp()[:, None] * F.softplus(steps)
    along_rows, along_columns = decay(x)
    assert along_rows.dtype == along_columns.dtype == torch.float32
    torch.testing.assert_close(along_rows, steps[..., 0].cumsum(2))
    torch.testing.assert_close(along_columns, steps[..., 1].cumsum(1))
    with torch.autocast("cpu", dtype):
        assert decay.float()(x.float())[0].dtype == torch.float32


def test_stages_have_their_attention_and_factors():
    for name, kinds, scaled in (
        ("ppma_t", (LineAttention, LineAttention, FullAttention, FullAttention), ()),
        ("ppma_b", (LineAttention, LineAttention, LineAttention, FullAttention), (2, 3)),
    ):
        stages = timm.create_model(name, device="meta").stages
        assert [{type(block.attn) for block in stage.blocks} for stage in stages] == [{kind} for kind in kinds]
        assert [i for i, stage in enumerate(stages) if hasattr(stage.blocks[0].ls1, "gamma")] == [*scaled]


def test_initialisation_is_official():
    torch.manual_seed(0)
    model = timm.create_model("test_ppma", layer_scale_init=1e-6, drop_path_rate=0.7)
    attn = model.stages[3].blocks[1].attn
    for layer in (attn.qkv, attn.proj, attn.decay.dt_linear, model.norm.proj, model.head):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.2)
        assert layer.bias is None or layer.bias.eq(0).all()
    assert model.stages[1].downsample.reduction.weight.std().item() == pytest.approx((1 / 3 / 16 / 9) ** 0.5, rel=0.1)
    for module in model.modules():
        if isinstance(module, PathDecay):
            steps, rates = F.softplus(module.dt_bias), module.A_log.exp()
            assert ((steps > 0.0009) & (steps < 0.101)).all()
            assert ((rates >= 1) & (rates < 1.11)).all()
    gamma = model.stages[3].blocks[0].ls1.gamma
    assert gamma.eq(1e-6).all()
    assert gamma.ndim == 4  # decayed, as in the official code
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


@torch.no_grad()
def test_norms_of_a_detection_checkpoint():
    """As the official backbones name them; these have no head."""
    norms = timm.create_model("test_ppma", num_classes=0, output_norm=True).output_norms.state_dict()
    state_dict = timm.create_model("test_ppma").state_dict()
    rest = {key: value for key, value in state_dict.items() if not key.startswith(("norm.", "head."))}
    official = rest | {f"outnorm{key[0]}.{key[2:]}": torch.randn_like(value) for key, value in norms.items()}
    official["layers.0.Relpos.angle"] = torch.ones(8)
    x, found = torch.randn(1, 3, 64, 64), []
    for normed in (True, False):
        overlay = {"state_dict": {"model": official}}
        kwargs = {"pretrained": True, "pretrained_cfg_overlay": overlay, "features_only": True}
        found.append(timm.create_model("test_ppma", output_norm=normed, **kwargs).eval()(x))
    for i, (got, feature) in enumerate(zip(*found, strict=True)):
        norm = official[f"outnorm{i}.weight"], official[f"outnorm{i}.bias"]
        want = F.layer_norm(feature.permute(0, 2, 3, 1), feature.shape[1:2], *norm, eps=1e-5)
        torch.testing.assert_close(got, want.permute(0, 3, 1, 2))


def test_keys_are_those_of_the_operator():
    check_keys("test_ppma", lambda site, token, size: [product(*map(range, size))])


def test_patterns():
    panels, got = patterns("ppma")
    assert got["PPMA"] == [product(range(28), range(28))]
    (weights,) = panels["PPMA"].maps
    row, column = panels["PPMA"].queries[0]
    assert weights[row, column] == 1 > weights[row, column + 1] > weights[row + 1, column + 2]


@pytest.mark.parametrize(("name", "task"), [("ppma_t", "detect"), ("ppma_b", "segment")])
def test_dense_prediction_changes_nothing(name, task):
    assert families.dense_kwargs(name, task) == {}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("name", "count"), [("ppma_t", 2.7), ("ppma_s", 4.9)])
def test_multiply_adds(name, count):
    assert multiply_adds(name) == pytest.approx(count, rel=0.03)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": (1, 2, 5, 4)}, r"num_heads=\(1, 2, 5, 4\) for embed_dims=.*divide"),
        ({"num_heads": (16, 2, 3, 4)}, r"num_heads=\(16, 2, 3, 4\) for embed_dims=.*even number of channels"),
        ({"by_lines": (True, 1, False, False)}, r"by_lines=\(True, 1, False, False\); it has to be True or False"),
        ({"by_lines": (True, False)}, r"2 by_lines=\(True, False\).*one value per stage"),
        ({"layer_scales": "abcd"}, "layer_scales='abcd'; give a list with one value per stage"),
        ({"layer_scale_init": "1"}, "layer_scale_init='1'; it has to be a number"),
        ({"head_width": 0}, "head_width=0; it has to be a whole number from 1 to 16,384"),
        ({"embed_dims": (1, 2, 4, 8), "num_heads": (1,) * 4}, r"embed_dims=\(1, 2, 4, 8\)"),
        ({"output_norm": True}, "output_norm=True with 1000 classes"),
    ],
    ids=["divisor", "pairs", "lines", "stages", "text", "init", "head", "channels", "output_norm"],
)
def test_bad_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_ppma", **kwargs)
