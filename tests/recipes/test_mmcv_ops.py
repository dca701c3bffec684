"""MMCV's operators backed by torchvision, called through mmcv.ops, against loops over single values. One minute."""

import importlib.util
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from zoo.messages import UserError
from zoo.recipes.dense import mmcv_ops

mmcv_ops.install()

from mmcv import ops  # noqa: E402
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction  # noqa: E402


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def draw(*shape, low=0.0, high=1.0):
    return low + (high - low) * torch.rand(*shape, dtype=torch.float64)


def random_boxes(count, size=40.0):
    corner = draw(count, 2, high=size)
    return torch.cat([corner, corner + draw(count, 2, low=1, high=size / 2)], dim=1)


def iou(a, b, offset=0):
    width = max(min(a[2], b[2]) - max(a[0], b[0]) + offset, 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]) + offset, 0)
    areas = [(box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def plain_nms(boxes, scores, threshold, offset=0):
    order = sorted(range(len(boxes)), key=lambda i: -scores[i])
    kept = []
    for i in order:
        if all(iou(boxes[i], boxes[k], offset) <= threshold for k in kept):
            kept.append(i)
    return kept


def pixel(image, y, x):
    height, width = image.shape
    return image[y, x].item() if 0 <= y < height and 0 <= x < width else 0.0


def bilinear(image, y, x):
    """The value of an (H, W) map, zero outside of it, between pixels."""
    top, left = math.floor(y), math.floor(x)
    return sum(
        pixel(image, top + i, left + j) * (1 - abs(y - top - i)) * (1 - abs(x - left - j))
        for i in (0, 1)
        for j in (0, 1)
    )


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
def test_nms_matches_reference(threshold, offset):
    boxes, scores = random_boxes(57), draw(57)
    dets, kept = ops.nms(boxes, scores, threshold, offset=offset)
    assert kept.tolist() == plain_nms(boxes.tolist(), scores.tolist(), threshold, offset)
    assert torch.equal(dets, torch.cat([boxes[kept], scores[kept, None]], dim=1))


def test_nms_offset_decides_for_small_boxes():
    boxes, scores = torch.tensor([[0.0, 0, 2, 2], [1.0, 0, 3, 2]]), torch.tensor([0.9, 0.8])
    assert ops.nms(boxes, scores, 0.4, offset=0)[1].tolist() == [0, 1]  # 1/3
    assert ops.nms(boxes, scores, 0.4, offset=1)[1].tolist() == [0]  # 1/2


def test_nms_score_threshold_and_number():
    boxes, scores = random_boxes(40), draw(40)
    _, kept = ops.nms(boxes, scores, 0.3, score_threshold=0.5, max_num=4)
    want = [i for i in plain_nms(boxes.tolist(), scores.tolist(), 0.3) if scores[i] > 0.5]
    assert kept.tolist() == want[:4]


def test_nms_of_arrays():
    boxes, scores = random_boxes(9).numpy().astype(np.float32), draw(9).numpy().astype(np.float32)
    dets, kept = ops.nms(boxes, scores, 0.2)
    assert isinstance(dets, np.ndarray)
    assert kept.tolist() == plain_nms(boxes.tolist(), scores.tolist(), 0.2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nms_of_half_precision(dtype):
    boxes, scores = random_boxes(30).to(dtype), torch.linspace(0, 0.9, 30).to(dtype)
    assert ops.nms(boxes, scores, 0.3)[1].tolist() == plain_nms(boxes.tolist(), scores.tolist(), 0.3)


@pytest.mark.parametrize("split_thr", [10000, 10])
def test_batched_nms_keeps_classes_apart(split_thr):
    boxes, scores, classes = random_boxes(40), draw(40), torch.randint(0, 3, (40,))
    dets, kept = ops.batched_nms(boxes, scores, classes, {"type": "nms", "iou_threshold": 0.3, "split_thr": split_thr})
    want = []
    for index in range(3):
        own = (classes == index).nonzero()[:, 0]
        want += [own[i].item() for i in plain_nms(boxes[own].tolist(), scores[own].tolist(), 0.3)]
    assert kept.tolist() == sorted(want, key=lambda i: -scores[i])
    assert torch.equal(dets[:, 4], scores[kept])


def test_nms_of_nothing():
    dets, kept = ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert dets.shape == (0, 5)
    assert (kept.shape, kept.dtype) == ((0,), torch.int64)


def plain_soft_nms(boxes, scores, method, threshold, sigma, min_score, offset):
    left, scores = list(range(len(boxes))), list(scores)
    result = []
    while left:
        best = max(left, key=lambda i: scores[i])
        result.append((best, scores[best]))
        left.remove(best)
        for i in left[:]:
            overlap = iou(boxes[best], boxes[i], offset)
            if method == "gaussian":
                scores[i] *= math.exp(-(overlap**2) / sigma)
            elif overlap >= threshold:
                scores[i] *= 1 - overlap if method == "linear" else 0
            if scores[i] < min_score:
                left.remove(i)
    return result


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
def test_soft_nms_matches_reference(method, offset):
    boxes, scores = random_boxes(31), draw(31)
    dets, kept = ops.soft_nms(boxes, scores, 0.3, sigma=0.4, min_score=0.1, method=method, offset=offset)
    want = plain_soft_nms(boxes.tolist(), scores.tolist(), method, 0.3, 0.4, 0.1, offset)
    assert kept.tolist() == [i for i, _ in want]
    assert torch.equal(dets[:, :4], boxes[kept])
    torch.testing.assert_close(dets[:, 4], torch.tensor([score for _, score in want], dtype=torch.float64))


def test_soft_nms_of_nothing():
    dets, kept = ops.soft_nms(torch.zeros(0, 4), torch.zeros(0))
    assert (dets.shape, kept.shape, kept.dtype) == ((0, 5), (0,), torch.int64)


def plain_roi_align(image, rois, size, scale, ratio, aligned):
    _, channels, height, width = image.shape
    result = torch.zeros(len(rois), channels, *size, dtype=torch.float64)
    for r, (index, *box) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (scale * value - (0.5 if aligned else 0) for value in box)
        sides = [y2 - y1, x2 - x1] if aligned else [max(y2 - y1, 1), max(x2 - x1, 1)]
        steps = [ratio or math.ceil(side / n) for side, n in zip(sides, size, strict=True)]
        for c, i, j in np.ndindex(channels, *size):
            total = 0.0
            for a, b in np.ndindex(*steps):
                y = y1 + (i + (a + 0.5) / steps[0]) * sides[0] / size[0]
                x = x1 + (j + (b + 0.5) / steps[1]) * sides[1] / size[1]
                if (
                    -1 <= y <= height and -1 <= x <= width
                ):  # near the border the value is extended, and farther out it is zero
                    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
                    total += bilinear(image[int(index), c], y, x)
            result[r, c, i, j] = total / (steps[0] * steps[1])
    return result


ROIS = torch.tensor(
    [[0, 1.5, 2.0, 9.7, 8.1], [1, 0.0, 0.0, 14.0, 10.0], [1, -6.0, 3.0, 5.0, 20.0], [0, 4.0, 4.0, 4.5, 4.2]],
    dtype=torch.float64,
)


@pytest.mark.parametrize("ratio", [0, 1, 3])
@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align_matches_reference(aligned, ratio):
    image = draw(2, 3, 5, 7)
    result = ops.roi_align(image, ROIS, (3, 2), 0.5, ratio, "avg", aligned)
    torch.testing.assert_close(result, plain_roi_align(image, ROIS, (3, 2), 0.5, ratio, aligned))


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align_gradient(aligned, ratio):
    image = draw(2, 2, 5, 7).requires_grad_()
    assert gradcheck(lambda x: ops.roi_align(x, ROIS, (3, 2), 0.5, ratio, "avg", aligned), image)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_roi_align_of_half_precision(dtype):
    image = draw(2, 2, 5, 7).to(dtype).requires_grad_()
    result = ops.RoIAlign(2, 0.5)(image, ROIS.to(dtype))
    result.sum().backward()
    exact = image.detach().float().requires_grad_()
    wanted = ops.RoIAlign(2, 0.5)(exact, ROIS.to(dtype).float())
    wanted.sum().backward()
    assert torch.equal(result, wanted.to(dtype))
    assert torch.equal(image.grad, exact.grad.to(dtype))


def test_roi_align_of_no_regions():
    image = draw(2, 3, 5, 7).requires_grad_()
    result = ops.RoIAlign((3, 2))(image, torch.zeros(0, 5, dtype=torch.float64))
    assert result.shape == (0, 3, 3, 2)
    result.sum().backward()
    assert not image.grad.any()


def test_roi_align_has_no_maximum():
    with pytest.raises(UserError, match="no pool_mode='max': use 'avg'"):
        ops.roi_align(draw(1, 1, 4, 4), ROIS[:1], 2, 1.0, 0, "max", True)


def plain_deform_conv(image, offset, mask, weight, bias, stride, padding, dilation, groups, deform_groups):
    batch, channels, height, width = image.shape
    out_channels, per_group, kh, kw = weight.shape
    rows = (height + 2 * padding[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    columns = (width + 2 * padding[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    offset = offset.reshape(batch, deform_groups, kh, kw, 2, rows, columns)
    mask = torch.ones(1) if mask is None else mask
    mask = mask.expand(batch, deform_groups * kh * kw, rows, columns) if mask.ndim == 1 else mask
    mask = mask.reshape(batch, deform_groups, kh, kw, rows, columns)
    result = torch.zeros(batch, out_channels, rows, columns, dtype=torch.float64)
    for b, o, i, j in np.ndindex(result.shape):
        first = o // (out_channels // groups) * per_group
        total = 0.0 if bias is None else bias[o].item()
        for c, p, q in np.ndindex(per_group, kh, kw):
            group = (first + c) // (channels // deform_groups)
            dy, dx = offset[b, group, p, q, :, i, j].tolist()
            y = i * stride[0] - padding[0] + p * dilation[0] + dy
            x = j * stride[1] - padding[1] + q * dilation[1] + dx
            value = bilinear(image[b, first + c], y, x)
            total += value * weight[o, c, p, q].item() * mask[b, group, p, q, i, j].item()
        result[b, o, i, j] = total
    return result


# input size, kernel, stride, padding, dilation, groups, deformable groups; the offsets reach beyond the border
GEOMETRIES = {
    "plain": ((5, 4), (3, 3), (1, 1), (1, 1), (1, 1), 1, 1),
    "uneven": ((7, 6), (3, 2), (2, 1), (1, 2), (2, 1), 1, 2),
    "groups": ((4, 5), (1, 2), (1, 2), (0, 0), (1, 1), 2, 4),
}


def deform_inputs(name, modulated):
    (height, width), kernel, stride, padding, dilation, groups, deform_groups = GEOMETRIES[name]
    image, weight = draw(2, 4, height, width), draw(6, 4 // groups, *kernel, low=-1)
    sides = [
        (side + 2 * p - d * (k - 1) - 1) // s + 1
        for side, k, s, p, d in zip((height, width), kernel, stride, padding, dilation, strict=True)
    ]
    taps = deform_groups * kernel[0] * kernel[1]
    offset = draw(2, 2 * taps, *sides, low=-2.5, high=2.5)
    mask = draw(2, taps, *sides) if modulated else None
    return image, offset, mask, weight, (stride, padding, dilation, groups, deform_groups)


@pytest.mark.slow
@pytest.mark.parametrize("name", GEOMETRIES)
def test_deform_conv_matches_reference(name):
    image, offset, _, weight, geometry = deform_inputs(name, modulated=False)
    result = ops.deform_conv2d(image, offset, weight, *geometry)
    torch.testing.assert_close(result, plain_deform_conv(image, offset, None, weight, None, *geometry))


@pytest.mark.slow
@pytest.mark.parametrize("name", GEOMETRIES)
def test_deform_conv_gradients(name):
    image, offset, _, weight, geometry = deform_inputs(name, modulated=False)
    tensors = [x.requires_grad_() for x in (image, offset, weight)]
    assert gradcheck(lambda *x: ops.deform_conv2d(*x, *geometry), tensors)


@pytest.mark.slow
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_modulated_deform_conv_matches_reference(name, with_bias):
    image, offset, mask, weight, geometry = deform_inputs(name, modulated=True)
    bias = draw(6) if with_bias else None
    result = ops.modulated_deform_conv2d(image, offset, mask, weight, bias, *geometry)
    torch.testing.assert_close(result, plain_deform_conv(image, offset, mask, weight, bias, *geometry))


@pytest.mark.slow
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_modulated_deform_conv_gradients(name, with_bias):
    image, offset, mask, weight, geometry = deform_inputs(name, modulated=True)
    tensors = [image, offset, mask, weight, *([draw(6)] if with_bias else [])]
    rest = () if with_bias else (None,)
    assert gradcheck(
        lambda *x: ops.modulated_deform_conv2d(*x, *rest, *geometry), [x.requires_grad_() for x in tensors]
    )


def test_deform_conv_of_half_precision():
    image, offset, mask, weight, geometry = (
        x.bfloat16() if isinstance(x, torch.Tensor) else x for x in deform_inputs("uneven", modulated=True)
    )
    result = ops.modulated_deform_conv2d(image, offset, mask, weight, None, *geometry)
    tensors = [x.float() for x in (image, offset, mask, weight)]
    assert torch.equal(result, ops.modulated_deform_conv2d(*tensors, None, *geometry).bfloat16())


def test_deform_conv_layers_start_as_convolutions():
    image = draw(2, 4, 6, 5).float()
    for layer in (ops.DeformConv2dPack(4, 3, 3, padding=1), ops.ModulatedDeformConv2dPack(4, 3, 3, padding=1)):
        bias = getattr(layer, "bias", None)
        scale = 1 if isinstance(layer, ops.DeformConv2dPack) else 0.5  # sigmoid(0)
        want = scale * torch.nn.functional.conv2d(image, layer.weight, padding=1)
        torch.testing.assert_close(layer(image), want if bias is None else want + bias[:, None, None])


def plain_focal_loss(logits, labels, gamma, alpha, weight):
    result = torch.zeros_like(logits)
    for n, c in np.ndindex(logits.shape):
        p = 1 / (1 + math.exp(-logits[n, c].item()))
        if labels[n] == c:
            result[n, c] = -alpha * (1 - p) ** gamma * math.log(p)
        else:
            result[n, c] = -(1 - alpha) * p**gamma * math.log(1 - p)
        if weight is not None:
            result[n, c] *= weight[labels[n]]
    return result


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_matches_reference(gamma, weighted):
    # The label 5 of unweighted losses is the background.
    logits, labels = draw(7, 5, low=-4, high=4), torch.tensor([0, 1, 2, 3, 4, 2, 0 if weighted else 5])
    weight = draw(5) if weighted else None
    want = plain_focal_loss(logits, labels, gamma, 0.3, weight)
    torch.testing.assert_close(ops.sigmoid_focal_loss(logits, labels, gamma, 0.3, weight, "none"), want)
    torch.testing.assert_close(ops.sigmoid_focal_loss(logits, labels, gamma, 0.3, weight, "sum"), want.sum())
    torch.testing.assert_close(ops.sigmoid_focal_loss(logits, labels, gamma, 0.3, weight, "mean"), want.sum() / 7)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_gradient(gamma, weighted):
    logits, labels = draw(4, 5, low=-4, high=4).requires_grad_(), torch.tensor([0, 1, 4, 0 if weighted else 5])
    weight = draw(5) if weighted else None
    for reduction in ("none", "mean", "sum"):
        assert gradcheck(lambda x, r=reduction: ops.sigmoid_focal_loss(x, labels, gamma, 0.3, weight, r), logits)


def test_focal_loss_of_certain_logits_is_finite():
    logits = torch.tensor([[200.0, -200.0], [200.0, -200.0]], requires_grad=True)
    loss = ops.sigmoid_focal_loss(logits, torch.tensor([0, 1]), 0.5, 0.25, None, "none")
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.tensor([[0.0, 0.0], [150.0, 50.0]]))
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, 0.0], [0.75, -0.25]]))


def test_focal_loss_of_nothing():
    logits = torch.zeros(0, 3, requires_grad=True)
    ops.sigmoid_focal_loss(logits, torch.zeros(0, dtype=torch.int64), 2.0, 0.25, None, "sum").backward()
    assert logits.grad.shape == (0, 3)


SHAPES = torch.tensor([[3, 5], [2, 1]])


def attention_inputs(batch=2, queries=3, heads=2, dim=3, points=2):
    value = draw(batch, int(SHAPES.prod(dim=1).sum()), heads, dim, low=-1)
    locations = draw(batch, queries, heads, len(SHAPES), points, 2, low=-0.3, high=1.3)  # also outside of the maps
    weights = draw(batch, queries, heads, len(SHAPES), points)
    return value, locations, weights


def deformable_attention(value, locations, weights):
    start = torch.tensor([0, int(SHAPES[0].prod())])
    return MultiScaleDeformableAttnFunction.apply(value, SHAPES, start, locations, weights, 64)


def test_deformable_attention_matches_reference():
    value, locations, weights = attention_inputs()
    want = torch.zeros(2, 3, 2, 3, dtype=torch.float64)
    levels = value.split([15, 2], dim=1)
    for b, q, n, d, level, point in np.ndindex(*want.shape, 2, 2):
        height, width = SHAPES[level].tolist()
        x, y = locations[b, q, n, level, point].tolist()
        image = levels[level][b, :, n, d].reshape(height, width)
        want[b, q, n, d] += weights[b, q, n, level, point] * bilinear(image, y * height - 0.5, x * width - 0.5)
    torch.testing.assert_close(deformable_attention(value, locations, weights), want.flatten(2))


@pytest.mark.slow
def test_deformable_attention_gradients():
    assert gradcheck(deformable_attention, [x.requires_grad_() for x in attention_inputs()])


def test_deformable_attention_keeps_the_type():
    value, locations, weights = (x.bfloat16().requires_grad_() for x in attention_inputs())
    result = deformable_attention(value, locations, weights)
    result.sum().backward()
    assert {x.dtype for x in (result, value.grad, locations.grad, weights.grad)} == {torch.bfloat16}


def test_missing_operator_says_so():
    with pytest.raises(UserError, match="'nms_rotated' has no replacement from torchvision: choose a model that does"):
        ops.nms_rotated(torch.rand(3, 5), torch.rand(3), 0.5)


def test_install_again_changes_nothing():
    before = sys.modules["mmcv._ext"]
    mmcv_ops.install()
    assert sys.modules["mmcv._ext"] is before


def test_mmengine_finds_the_extension():
    assert importlib.util.find_spec("mmcv._ext").name == "mmcv._ext"
    assert not hasattr(sys.modules["mmcv._ext"], "__path__")


def test_list_of_versions_says_where_the_operators_are_from():
    assert ops.get_compiler_version() == ops.get_compiling_cuda_version() == "none: operators from torchvision"


INSTALLED = """
import os, sys, mmcv
from zoo.recipes.dense import mmcv_ops
for folder in sys.argv[1:]:
    if not os.fork():
        mmcv.__path__.append(folder)
        mmcv_ops.install()
        print(sys.modules["mmcv._ext"].__file__ if hasattr(sys.modules["mmcv._ext"], "__file__") else "stand-in")
        if not os.listdir(folder):
            import mmdet.models, mmseg.models
            from mmdet.registry import MODELS
            print(MODELS.get("DINO").__name__)
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
def test_extension_of_mmcv(tmp_path):
    """None, one that fits, and one that was compiled for another torch, in a process each."""
    none, fitting, other = (tmp_path / name for name in ("none", "fitting", "other"))
    for folder in (none, fitting, other):
        folder.mkdir()
    (fitting / "_ext.py").write_text("def nms(*args): ...\n")
    (other / "_ext.py").write_text("raise ImportError('undefined symbol: _ZN2at')\n")
    command = [sys.executable, "-c", INSTALLED, none, fitting, other]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert result.stdout.split() == ["stand-in", "DINO", str(fitting / "_ext.py"), "stand-in"], result.stderr
    assert result.stderr.count("can't be loaded") == 1
    assert "can't be loaded (undefined symbol: _ZN2at): torchvision's take their place" in result.stderr
