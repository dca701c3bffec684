"""TensorFlow's checkpoints, in the files and archives that a small writer of the format makes. 1 s."""

import struct
import tarfile

import pytest
import torch

from zoo import checkpoints, tensorflow_files

NUMBERS = {torch.float32: 1, torch.float64: 2, torch.int64: 9, torch.bfloat16: 14, torch.float16: 19}


def varint(number):
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def block(items, interval=3):
    """A block of a LevelDB table, whose keys are stored whole every few entries."""
    out, restarts, before = bytearray(), [], b""
    for i, (key, value) in enumerate(items):
        shared = 0
        if i % interval:
            shared = next(
                (j for j, pair in enumerate(zip(before, key, strict=False)) if len(set(pair)) > 1), len(before)
            )
        else:
            restarts.append(len(out))
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        before = key
    restarts = restarts or [0]
    return bytes(out) + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def table(items, size=5):
    """A LevelDB table without compression, with so many entries in a block."""
    out, handles = bytearray(), []

    def add(content):
        handle = varint(len(out)) + varint(len(content))
        out.extend(content + b"\0" + b"crc_")
        return handle

    for start in range(0, len(items), size):
        part = items[start : start + size]
        handles.append((part[-1][0], add(block(part))))
    footer = add(block([])) + add(block(handles))
    return bytes(out) + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def bundle(variables, shards=1):
    """The contents of a checkpoint's files, by the ends of their names."""
    data = [bytearray(b"\0" * 3) for _ in range(shards)]  # values need not begin at the start
    items = [(b"", field(1, shards) + field(3, field(1, 1)))]
    for i, (name, value) in enumerate(sorted(variables.items())):
        content = value.reshape(-1).view(torch.uint8).numpy().tobytes()
        shape = b"".join(field(2, field(1, side)) for side in value.shape)
        entry = field(1, NUMBERS[value.dtype]) + field(2, shape) + field(3, i % shards)
        entry += field(4, len(data[i % shards])) + field(5, len(content)) + varint(6 << 3 | 5) + b"crc_"
        items.append((name.encode(), entry))
        data[i % shards] += content
    items.append((b"~graph", field(1, 7) + field(5, 4)))  # a string
    return {".index": table(items)} | {f".data-{i:05d}-of-{shards:05d}": bytes(d) for i, d in enumerate(data)}


def write(folder, files, name="model.ckpt-7"):
    for end, content in files.items():
        (folder / f"{name}{end}").write_bytes(content)
    return folder / f"{name}.index"


def pack(folder, files):
    (folder / "inside").mkdir()
    write(folder / "inside", files)
    with tarfile.open(folder / "weights.tar.gz", "w:gz") as archive:
        archive.add(folder / "inside", "weights")
    return folder / "weights.tar.gz"


@pytest.fixture
def variables():
    generator = torch.Generator().manual_seed(0)
    shapes = {f"stem/layer_{i}/kernel": (3, 3, i + 1, 2) for i in range(12)} | {"scalar": (), "empty": (0, 4)}
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return found | {"half": torch.randn(300).half(), "brain": torch.randn(5).bfloat16(), "step": torch.arange(3)}


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("save", [write, pack])
def test_all_variables_are_read(tmp_path, variables, save, shards):
    found = checkpoints.read(save(tmp_path, bundle(variables, shards)))
    assert found.keys() == variables.keys()
    for name, value in variables.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: files | {".index": files[".index"][:-1]}, "not a table of TensorFlow"),
        (lambda files: files | {".data-00000-of-00001": b"short"}, "its values are not complete"),
        (lambda files: {".index": files[".index"]}, "damaged, incomplete"),
    ],
    ids=["index", "values", "no_values"],
)
@pytest.mark.parametrize("save", [write, pack])
def test_damaged_checkpoint_is_refused(tmp_path, variables, save, change, message):
    with pytest.raises(ValueError, match=message):
        checkpoints.read(save(tmp_path, change(bundle(variables))))


def test_archive_without_a_checkpoint_is_refused(tmp_path):
    path = pack(tmp_path, {".txt": b"nothing"})
    with pytest.raises(ValueError, match="the archive has 0 TensorFlow checkpoints"):
        checkpoints.read(path)


def test_archive_that_unpacks_to_far_more_is_refused(tmp_path):
    path = pack(tmp_path, bundle({"zeros": torch.zeros(10**6)}))
    with pytest.raises(ValueError, match="more than eight times"):
        checkpoints.read(path)


def test_layouts_are_pytorchs():
    conv = torch.nn.Conv2d(3, 4, (1, 2))
    heads, back = torch.nn.Linear(6, 8), torch.nn.Linear(8, 6)
    found = tensorflow_files.to_torch(
        {
            "conv/kernel": conv.weight.permute(2, 3, 1, 0),  # rows, columns, input, output
            "depthwise/depthwise_kernel": torch.arange(18.0).reshape(3, 3, 2, 1),
            "q/kernel": heads.weight.T.unflatten(1, (2, 4)),
            "q/bias": heads.bias.unflatten(0, (2, 4)),
            "o/kernel": back.weight.T.unflatten(0, (2, 4)),
            "o/bias": back.bias,
            "dense/kernel": heads.weight.T,
            "norm/gamma": torch.ones(3),
            "norm/beta/Adam": torch.ones(3),
            "norm/moving_mean": torch.zeros(3),
        }
    )
    assert torch.equal(found["conv.weight"], conv.weight)
    assert found["depthwise.weight"][1, 0].tolist() == torch.arange(18.0).reshape(3, 3, 2)[:, :, 1].tolist()
    assert torch.equal(found["q.weight"], heads.weight)
    assert torch.equal(found["q.bias"], heads.bias)
    assert torch.equal(found["o.weight"], back.weight)
    assert torch.equal(found["dense.weight"], heads.weight)
    assert found.keys() >= {"o.bias", "norm.weight", "norm.running_mean"}
    assert "norm.bias" not in found
