"""Agent attention against a plain formulation, its biases for other maps, Swin's shift, loading, facts. 10 s."""

import pytest
import timm
import torch
from torch.nn import functional as F

from zoo import families
from zoo.agent import (
    VARIANTS,
    AgentAttention,
    AgentCSWin,
    AgentPVT,
    AgentSwin,
    PatchEmbedding,
    PatchMerging,
    ShiftedWindowAttention,
    checkpoint_filter_fn,
    resize_map,
    shifted_regions,
)
from zoo.stripes import CrossShapedAttention, GlobalAttention

from .attended import check_keys, patterns, product
from .test_parity import multiply_adds

SMALL = {
    "depths": (1, 1, 2, 2),
    "embed_dims": (8, 16, 32, 32),
    "num_heads": (1, 2, 4, 4),
    "agent_grid": (3, 2, 2, 2),
    "table_grid": (3, 2, 2, 2),
    "img_size": 64,
    "num_classes": 5,
}


def tokens(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def build(cls, *args, **kwargs):
    torch.manual_seed(0)
    module = cls(*args, dtype=torch.float64, **kwargs)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def settings(cls):
    return SMALL if cls is AgentPVT else SMALL | {"agent_depths": (1, 1, 0, 0)}


def small(cls, **kwargs):
    torch.manual_seed(0)
    return cls(**settings(cls) | kwargs).eval()


def plain_biases(attn, height, width):
    """Both biases (N, n, H, W) by F.interpolate: first over the map, then over the grid of agents."""
    found = []
    for places, rows, columns in (
        (attn.an_bias, attn.ah_bias, attn.aw_bias),
        (attn.na_bias, attn.ha_bias.permute(0, 3, 1, 2), attn.wa_bias.permute(0, 3, 1, 2)),
    ):
        bias = F.interpolate(places, (height, width), mode="bilinear")
        bias = bias + F.interpolate(rows + columns, (height, width), mode="bilinear")
        grid = bias.unflatten(1, (attn.table_grid, -1)).movedim((1, 2), (3, 4)).flatten(1, 2)  # (N, H W, m, m)
        grid = F.interpolate(grid, (attn.agent_grid, attn.agent_grid), mode="bilinear")
        found.append(grid.flatten(2).mT.unflatten(-1, (height, width)))
    return found


def plain_attention(attn, x):
    """Head by head on one image (H, W, C), agents as means of ranges of queries."""
    height, width, dim = x.shape
    if attn.separate_query:
        q, k, v = attn.q(x), *attn.kv(x).split(dim, -1)
    else:
        q, k, v = attn.qkv(x).split(dim, -1)
    m, d = attn.agent_grid, dim // attn.num_heads

    def place(i, side):
        return slice(i * side // m, -(-(i + 1) * side // m))

    agents = torch.stack([q[place(i, height), place(j, width)].mean((0, 1)) for i in range(m) for j in range(m)])
    to_tokens, to_agents = plain_biases(attn, height, width)
    out = torch.empty_like(x).flatten(0, 1)
    for n in range(attn.num_heads):
        a, query, key, value = (part.reshape(-1, dim)[:, n * d : (n + 1) * d] for part in (agents, q, k, v))
        summaries = (a @ key.T * d**-0.5 + to_tokens[n].flatten(1)).softmax(-1) @ value
        out[:, n * d : (n + 1) * d] = (query @ a.T * d**-0.5 + to_agents[n].flatten(1).T).softmax(-1) @ summaries
    conv = attn.lepe[0]
    lepe = F.conv2d(v.movedim(-1, 0), conv.weight, conv.bias, padding=1, groups=dim).movedim(0, -1)
    return attn.proj(out.reshape(x.shape) + lepe)


@torch.no_grad()
@pytest.mark.parametrize("size", [(6, 6), (7, 4), (2, 1)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize(("agents", "separate"), [(3, True), (3, False), (4, False)])
def test_attention_matches_a_plain_formulation(agents, separate, size):
    attn = build(AgentAttention, 8, 2, side=6, agent_grid=agents, table_grid=3, separate_query=separate)
    x = tokens(2, *size, 8)
    torch.testing.assert_close(attn(x), torch.stack([plain_attention(attn, image) for image in x]))


@pytest.mark.parametrize("size", [(5, 5), (9, 3), (1, 12)], ids=str)
def test_resizing_is_that_of_torch(size):
    table = tokens(1, 3, 5, 5)
    torch.testing.assert_close(resize_map(table, *size), F.interpolate(table, size, mode="bilinear"))
    assert torch.equal(resize_map(table, 5, 5), table)


@pytest.mark.slow
def test_onnx_pools_the_agents_of_any_map(tmp_path):
    import onnxruntime  # takes seconds

    attn = build(AgentAttention, 8, 2, side=7, agent_grid=3, table_grid=3).float()
    auto = dict.fromkeys((1, 2), torch.export.Dim.AUTO)
    program = torch.export.export(attn, (torch.randn(1, 9, 12, 8),), dynamic_shapes=(auto,))
    names = {"input_names": ["x"], "dynamic_shapes": ({1: "height", 2: "width"},)}
    torch.onnx.export(program, dynamo=True, verbose=False, **names).save(tmp_path / "attention.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "attention.onnx"))
    for size in ((9, 12), (8, 10), (13, 7)):
        x = torch.randn(1, *size, 8)
        (found,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), attn(x))


@torch.no_grad()
def test_biases_stay_as_they_are_at_the_usual_size():
    attn = build(AgentAttention, 8, 2, side=7, agent_grid=3, table_grid=3)
    bias = attn.bias(attn.an_bias, attn.ah_bias, attn.aw_bias, 7, 7)
    assert torch.equal(bias[0], (attn.an_bias + attn.ah_bias + attn.aw_bias).flatten(2))


@torch.no_grad()
@pytest.mark.parametrize("size", [(6, 9), (4, 4), (2, 5), (7, 3)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("window", [3, 4])
def test_shifted_windows_are_windows_of_the_shifted_map(window, size):
    """Each token attends to those of its own shifted window, on the padded map."""
    attn, x = build(ShiftedWindowAttention, 8, 2, window, shift=True), tokens(2, *size, 8)
    shift, (height, width) = window // 2, size
    sides = height + -height % window, width + -width % window
    padded = F.pad(x, (0, 0, 0, sides[1] - width, 0, sides[0] - height))
    q, k, v = (part.unflatten(-1, (2, 4)) for part in attn.qkv(padded).split(8, -1))
    want = torch.empty_like(x)
    for y in range(height):
        for column in range(width):
            keys = [
                (i, j)
                for i in range(sides[0])
                for j in range(sides[1])
                if (i - shift) // window == (y - shift) // window
                and (j - shift) // window == (column - shift) // window
            ]
            rows, columns = map(list, zip(*keys, strict=True))
            down = torch.tensor([y - i + window - 1 for i in rows])
            right = torch.tensor([column - j + window - 1 for j in columns])
            logits = torch.einsum("bnd,bknd->bnk", q[:, y, column], k[:, rows, columns]) * 4**-0.5
            weights = (logits + attn.bias_table[:, down, right]).softmax(-1)
            want[:, y, column] = torch.einsum("bnk,bknd->bnd", weights, v[:, rows, columns]).flatten(1)
    torch.testing.assert_close(attn(x), attn.proj(want))


def test_labels_of_a_shifted_map():
    want = [[0, 0, 0, 1, 2, 2], [3, 3, 3, 4, 5, 5], [6, 6, 6, 7, 8, 8], [6, 6, 6, 7, 8, 8]]
    assert shifted_regions(4, 6, 3, 2, torch.device("cpu")).tolist() == [want]


@torch.no_grad()
def test_merging_has_the_order_of_swin():
    merging, x = build(PatchMerging, 2, 3), tokens(1, 2, 5, 4)
    padded = F.pad(x, (0, 0, 0, 1)).permute(0, 2, 3, 1)
    parts = [padded[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
    want = merging.reduction(merging.norm(torch.cat(parts, -1)))
    torch.testing.assert_close(merging(x), want.permute(0, 3, 1, 2))


@torch.no_grad()
def test_position_embedding_is_resized_for_a_map_with_as_many_tokens():
    embedding, x = build(PatchEmbedding, 3, 4, 2, side=4), tokens(1, 3, 16, 5)
    table = F.interpolate(embedding.pos_embed.mT.unflatten(-1, (4, 4)), (8, 2), mode="bilinear")
    torch.testing.assert_close(embedding(x), embedding.norm(embedding.proj(x)) + table)


ARCHITECTURES = {"pvt": AgentPVT, "swin": AgentSwin, "cswin": AgentCSWin}


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (75, 50)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_size(name, size):
    model, x = small(ARCHITECTURES[name]), torch.randn(2, 3, *size)
    features = model.forward_intermediates(x, intermediates_only=True)
    sides = [[families.feature_side(f"agent_{name}_t", side, 4 << i) for side in size] for i in range(4)]
    assert [list(feature.shape[2:]) for feature in features] == sides
    torch.testing.assert_close(model(x)[1:], model(x[1:]))


@pytest.mark.long
@torch.no_grad()
@pytest.mark.parametrize("name", ["pvt", "cswin"])
def test_exported_program_takes_any_batch_and_size(name):
    """test_agent is an Agent-Swin, which test_families.py exports."""
    model, dim = small(ARCHITECTURES[name]), torch.export.Dim
    shapes = {0: dim("batch", max=64), 2: dim("height", min=64, max=4096), 3: dim("width", min=64, max=4096)}
    program = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=(shapes,)).module()
    for x in (torch.randn(1, 3, 80, 64), torch.randn(3, 3, 65, 130)):
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name", ["pvt", "cswin"])
def test_compiles_as_one_graph_with_gradients(name):
    torch._dynamo.reset()
    model, x = small(ARCHITECTURES[name]).train(), torch.randn(2, 3, 64, 64)
    want = torch.autograd.grad(model(x).square().sum(), tuple(model.parameters()))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x).square().sum(), tuple(model.parameters()))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_blocks_of_swin():
    def letters(**kwargs):
        model = timm.create_model("test_agent", **kwargs)
        kinds = {AgentAttention: "A", ShiftedWindowAttention: "B"}
        return [
            "".join(kinds[type(block.attn)] + "'" * bool(getattr(block.attn, "shift", 0)) for block in stage.blocks)
            for stage in model.stages
        ]

    assert letters() == ["AA", "AB'", "BB'", "BB"]
    assert letters(shift_all=True) == ["AA", "AB'", "BB'", "BB'"]
    assert letters(depths=(2, 2, 5, 2), agent_depths=(0, 2, 2, 1)) == ["BB'", "AA", "AABB'B", "AB"]
    model = timm.create_model("test_agent", shift_all=True)
    assert [model.stages[i].blocks[1].attn.window_size for i in (2, 3)] == [3, 2]


def test_blocks_of_cswin():
    kinds = [{type(block.attn) for block in stage.blocks} for stage in small(AgentCSWin).stages]
    assert kinds == [{AgentAttention}, {AgentAttention}, {CrossShapedAttention}, {GlobalAttention}]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("agent_pvt_s", {"agent_grid": (12, 16, 28, 28)}),
        ("agent_swin_b", {"agent_grid": (9, 12, 14, 7), "shift_all": True}),
        ("agent_cswin_t", {}),
        ("test_agent", {}),
    ],
)
def test_dense_kwargs_are_the_official_codes(name, expected):
    assert families.dense_kwargs(name, "detect") == families.dense_kwargs(name, "segment") == expected


def test_maps_are_rounded_as_the_layers_round_them():
    sides = {name: families.feature_side(f"agent_{name}_t", 203, 8) for name in ARCHITECTURES}
    assert sides == {"pvt": 25, "swin": 26, "cswin": 26}
    assert families.feature_side("agent_cswin_t", 201, 4) == 50


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tables_are_resized_for_other_images(name):
    model, larger = small(ARCHITECTURES[name]), small(ARCHITECTURES[name], img_size=96)
    converted = checkpoint_filter_fn(model.state_dict(), larger)
    assert {key: x.shape for key, x in converted.items()} == {key: x.shape for key, x in larger.state_dict().items()}
    attn, table = "stages.0.blocks.0.attn", model.stages[0].blocks[0].attn
    want = F.interpolate(table.ha_bias[:, :, 0].mT, 24, mode="linear").mT
    torch.testing.assert_close(converted[f"{attn}.ha_bias"][:, :, 0], want)
    want = F.interpolate(table.aw_bias[:, :, 0], 24, mode="linear")
    torch.testing.assert_close(converted[f"{attn}.aw_bias"][:, :, 0], want)
    if name == "pvt":
        want = F.interpolate(model.stem.pos_embed.mT.unflatten(-1, (16, 16)), (24, 24), mode="bilinear")
        torch.testing.assert_close(converted["stem.pos_embed"].mT.unflatten(-1, (24, 24)), want)


def test_tables_of_another_grid_of_agents_are_refused():
    other = timm.create_model("test_agent", agent_grid=(4, 2, 2, 2), table_grid=(4, 2, 2, 2))
    with pytest.raises(RuntimeError, match=r"of another shape.*an_bias.*of it is test_agent: the file is"):
        timm.create_model("test_agent", pretrained=True, pretrained_cfg_overlay={"state_dict": other.state_dict()})


def test_only_the_tables_of_windows_have_no_weight_decay():
    model = timm.create_model("test_agent")
    assert model.no_weight_decay() == {name for name, _ in model.named_parameters() if "bias_table" in name}
    assert len(model.no_weight_decay()) == 5
    assert small(AgentPVT).no_weight_decay() == set()


@pytest.mark.slow
def test_initialisation_is_official():
    torch.manual_seed(0)
    model = timm.create_model("agent_pvt_t")
    attn = model.stages[3].blocks[0].attn
    for tensor in (attn.an_bias, attn.wa_bias, model.stages[1].downsample.pos_embed, attn.kv.weight):
        assert tensor.std().item() == pytest.approx(0.02, rel=0.05)
    # PyTorch's default for convolutions: uniform within 1 / sqrt(fan in)
    assert attn.lepe[0].weight.abs().max().item() == pytest.approx(1 / 3, rel=0.01)
    assert model.stages[0].blocks[0].norm1.eps == 1e-6
    assert model.stem.norm.eps == 1e-5


@pytest.mark.parametrize(
    ("cls", "kwargs", "message"),
    [
        (AgentPVT, {"img_size": 16}, r"img_size=16; it has to be a whole number from 32 to 16,384"),
        (AgentPVT, {"img_size": (64, 96)}, r"img_size=\(64, 96\); it has to be one side"),
        (AgentPVT, {"agent_grid": (3, 4, 7)}, r"3 agent_grid=\(3, 4, 7\).*one value per stage"),
        (
            AgentPVT,
            {"table_grid": (0, 4, 7, 7)},
            r"table_grid=\(0, 4, 7, 7\); it has to be whole numbers from 1 to 128",
        ),
        (
            AgentSwin,
            {"agent_depths": (2, -1, 0, 0)},
            r"agent_depths=\(2, -1, 0, 0\); it has to be whole numbers from 0",
        ),
        (AgentSwin, {"agent_depths": (2, 0, 0, 3)}, r"agent_depths=\(2, 0, 0, 3\) for depths=\(1, 1, 2, 2\).*at most"),
        (AgentSwin, {"window_size": 0}, r"window_size=0; it has to be a whole number from 1 to 1,024"),
        (AgentSwin, {"shift_all": 1}, r"shift_all=1; it has to be one of True, False"),
        (AgentSwin, {"output_norm": True}, r"output_norm=True with 5 classes"),
        (AgentCSWin, {"split_size": 2.5}, r"split_size=2.5; it has to be a whole number"),
        (AgentCSWin, {"num_heads": (1, 2, 1, 1)}, r"num_heads=\(1, 2, 1, 1\).*even"),
    ],
)
def test_bad_argument_is_named(cls, kwargs, message):
    with pytest.raises(ValueError, match=message):
        cls(**settings(cls) | kwargs)


def test_keys_are_those_of_the_operator():
    def keys(site, token, size):
        if site.stage == 1 or (site.stage == 2 and site.block == 1):
            return [product(range(size[0]), range(size[1]))]
        side = (0, 3, 3, 2)[site.stage - 1]
        shift = side // 2 if site.block == 2 and site.stage < 4 else 0
        axes = [
            [other for other in range(length) if (other - shift) // side == (place - shift) // side]
            for place, length in zip(token, size, strict=True)
        ]
        return [product(*axes)]

    check_keys("test_agent", keys)


def test_pattern():
    panel, maps = patterns("agent")
    assert set(panel) == {"Agent"}
    part, keys = maps["Agent"]
    assert keys == product(range(28), range(28))
    assert part == product(range(7, 14), range(14, 21))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("name", "billions"), [("agent_pvt_t", 2.0), ("agent_swin_t", 4.5), ("agent_cswin_t", 4.3)])
def test_multiply_adds_are_the_papers(name, billions):
    assert multiply_adds(name) == pytest.approx(billions, rel=0.03)


def test_every_variant_has_its_architecture():
    assert {name.split("_")[1] for name in VARIANTS} == {*ARCHITECTURES, "agent"}
    assert all("embed_dims" in settings or "pvt" in name for name, settings in VARIANTS.items())
