"""pretrained.py against torch.save and torch.load, and against files made to do harm."""

import collections
import hashlib
import io
import os
import pickle
import struct
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxseg.pretrained import convert_resnet, load_encoder, read_torch
from jaxseg.resnet import ResNet

NEEDS_TORCH = "needs torch==2.13.0 (CPU build)"


def write_zip(path, pickled, records=None, compression=zipfile.ZIP_STORED):
    """Writes a file laid out as torch.save does."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for key, data in (records or {}).items():
            archive.writestr(f"archive/data/{key}", data)
    return path


class _Global:
    """Pickles as a reference to a function or class of any name, whether it exists or not."""

    def __init__(self, module, name, *arguments):
        self.module, self.name, self.arguments = module, name, arguments


class _Storage:
    """Pickles as torch.save's reference to a storage."""

    def __init__(self, size, key="0", kind="FloatStorage", tag="storage"):
        self.size, self.key, self.kind, self.tag = size, key, kind, tag


class _Pickler(pickle._Pickler):
    """Writes the two classes above."""

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, _Global):
            self.write(f"c{obj.module}\n{obj.name}\n".encode())
            super().save(tuple(obj.arguments))
            self.write(pickle.REDUCE)
        elif isinstance(obj, _Storage):
            self.write(pickle.MARK)
            super().save(obj.tag)
            self.write(f"ctorch\n{obj.kind}\n".encode())
            for item in (obj.key, "cpu", obj.size):
                super().save(item)
            self.write(pickle.TUPLE + pickle.BINPERSID)
        else:
            super().save(obj, save_persistent_id)


def pickled(value):
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()


def tensor(storage, offset, shape, strides):
    arguments = (storage, offset, shape, strides, False, collections.OrderedDict())
    return _Global("torch._utils", "_rebuild_tensor_v2", *arguments)


def assert_one_line(error, path, *words):
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    for word in words:
        assert word in message


def test_reads_what_the_format_says_without_torch(tmp_path):
    """Written by hand, so that it runs where PyTorch is not installed."""
    numbers = np.arange(12, dtype="<f4")
    state = {
        "rows": tensor(_Storage(12), 0, (3, 4), (4, 1)),
        "transposed": tensor(_Storage(12), 0, (4, 3), (1, 4)),
        "part": tensor(_Storage(12), 5, (2, 2), (4, 2)),
        "expanded": tensor(_Storage(12), 7, (3, 2), (0, 0)),
        "scalar": tensor(_Storage(12), 11, (), ()),
        "empty": tensor(_Storage(12), 0, (0, 3), (3, 1)),
    }
    path = write_zip(tmp_path / "a.pth", pickled(state), {"0": numbers.tobytes()})
    got = read_torch(path)
    np.testing.assert_array_equal(got["rows"], numbers.reshape(3, 4))
    np.testing.assert_array_equal(got["transposed"], numbers.reshape(3, 4).T)
    np.testing.assert_array_equal(got["part"], [[5, 7], [9, 11]])
    np.testing.assert_array_equal(got["expanded"], np.full((3, 2), 7))
    assert got["scalar"].shape == () and got["scalar"] == 11
    assert got["empty"].shape == (0, 3)


@pytest.mark.parametrize(
    "dtype",
    ["float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"],
    ids=lambda name: name,
)
def test_round_trip_of_every_dtype(tmp_path, dtype):
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    expected = (torch.arange(24).reshape(2, 3, 4) - 5).to(getattr(torch, dtype))
    torch.save({"a": expected}, tmp_path / "a.pth")
    got = read_torch(tmp_path / "a.pth")["a"]
    assert got.dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype))
    np.testing.assert_array_equal(got.astype(np.float64), expected.to(torch.float64).numpy())


def test_round_trip_of_views_and_parameters(tmp_path):
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    base = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))
    state = {
        "base": base,
        "transposed": base.permute(2, 0, 1),
        "part": base[2:5, 1::2, 3],
        "expanded": base[3:4].expand(7, 5, 4),
        "channels_last": torch.arange(120.0).reshape(1, 4, 5, 6).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base[1]),
    }
    torch.save(collections.OrderedDict(state), tmp_path / "a.pth")
    got = read_torch(tmp_path / "a.pth")
    assert list(got) == list(state)
    for name, expected in state.items():
        np.testing.assert_array_equal(got[name], expected.detach().numpy())


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
def test_unwraps_the_state_dict_of_a_module(tmp_path, wrap):
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    torch.save(wrap(module.state_dict()), tmp_path / "a.pth")
    got = read_torch(str(tmp_path / "a.pth"))
    assert got.keys() == module.state_dict().keys()
    for name, expected in module.state_dict().items():
        np.testing.assert_array_equal(got[name], expected.numpy())
        assert got[name].dtype == expected.numpy().dtype


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("nt", "system"),
        ("builtins", "eval"),
        ("__builtin__", "eval"),
        ("builtins", "getattr"),
        ("collections", "OrderedDict.__init__"),
        ("torch._utils", "_rebuild_tensor"),
        ("torch.nn.modules.conv", "Conv2d"),
        ("numpy", "load"),
        ("nowhere", "Unknown"),
    ],
)
@pytest.mark.parametrize("inside", [lambda value: value, lambda value: {"state_dict": {"a": value}}])
def test_refuses_every_other_function_and_executes_nothing(tmp_path, module, name, inside):
    witness = tmp_path / "witness"
    path = write_zip(tmp_path / "a.pth", pickled(inside(_Global(module, name, f"touch {witness}"))))
    with pytest.raises(ValueError) as error:
        read_torch(path)
    assert_one_line(error, path, f"{module}.{name}", "state_dict")
    assert not witness.exists()


def test_refuses_a_pickle_of_python_that_runs_a_command(tmp_path):
    """The usual attack, as pickle itself writes it; it works on pickle.loads, which shows that the test can fail."""
    witness = tmp_path / "witness"

    class Attack:
        def __reduce__(self):
            return os.system, (f"echo > {witness}",)

    attack = pickle.dumps({"a": Attack()})
    pickle.loads(attack)
    assert witness.exists()
    witness.unlink()
    path = write_zip(tmp_path / "a.pth", attack)
    with pytest.raises(ValueError) as error:
        read_torch(path)
    assert_one_line(error, path, "system")
    assert not witness.exists()


def test_a_file_cannot_change_how_the_next_is_read(tmp_path):
    """BUILD sets attributes on what the allowlist returns: it must not reach the reader's own functions."""
    defaults = pickled((None, {"__defaults__": (0, (1,), (1,))}))[2:-1]
    names = [b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n"]
    attacks = [write_zip(tmp_path / f"{i}.pth", b"\x80\x02" + name + defaults + b"b.") for i, name in enumerate(names)]
    # A tensor without its offset, shape and strides, which those defaults would complete.
    call = _Global("torch._utils", "_rebuild_tensor_v2", _Storage(1))
    incomplete = write_zip(tmp_path / "incomplete.pth", pickled({"a": call}), {"0": bytes(4)})
    for path in (incomplete, *attacks, incomplete):
        with pytest.raises(ValueError) as error:
            read_torch(path)
        assert_one_line(error, path)
    assert not hasattr(collections.OrderedDict, "__defaults__")


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (13,), (1,)),
        (1, (12,), (1,)),
        (0, (3, 4), (5, 1)),
        (12, (1,), (1,)),
        (-1, (2,), (1,)),
        (11, (2,), (-1,)),
        (0, (-1,), (1,)),
        (0, (3, 4), (4,)),
        (0, (5,), (2**60,)),  # (5 - 1) * 2^60 * 4 bytes is 0 in 64 bits
        (0, (2**40,), (1,)),
        (2**70, (1,), (1,)),
        (0.0, (1,), (1,)),
        (True, (1,), (1,)),
        (0, "ab", (1, 1)),
        (0, 3, 1),
    ],
)
def test_refuses_a_tensor_outside_its_storage(tmp_path, offset, shape, strides):
    state = {"weight": tensor(_Storage(12), offset, shape, strides)}
    path = write_zip(tmp_path / "a.pth", pickled(state), {"0": bytes(48)})
    with pytest.raises(ValueError) as error:
        read_torch(path)
    assert_one_line(error, path, "download it again")
    if not isinstance(shape, int):
        assert "'weight'" in str(error.value)


@pytest.mark.parametrize(
    "storage",
    [
        _Storage(13),  # larger than its record
        _Storage(11),
        _Storage(-12),
        _Storage(12.0),
        _Storage(12, key="1"),  # no such record
        _Storage(12, key="../../archive/data/0"),
        _Storage(12, key=0),
        _Storage(12, tag="module"),
        _Storage(6, kind="ComplexFloatStorage"),
        "not a storage",
    ],
)
def test_refuses_a_storage_that_is_not_in_the_file(tmp_path, storage):
    path = write_zip(tmp_path / "a.pth", pickled({"weight": tensor(storage, 0, (1,), (1,))}), {"0": bytes(48)})
    with pytest.raises(ValueError) as error:
        read_torch(path)
    assert_one_line(error, path)


def good_file(path):
    return write_zip(path, pickled({"a": tensor(_Storage(100), 0, (100,), (1,))}), {"0": bytes(400)})


def test_refuses_a_truncated_file_at_every_length(tmp_path):
    whole = good_file(tmp_path / "whole.pth").read_bytes()
    path = tmp_path / "part.pth"
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError) as error:
            read_torch(path)
        assert_one_line(error, path, "again")


def test_refuses_a_file_with_changed_bytes_or_reads_it(tmp_path):
    """Never anything but a one-line ValueError, whichever byte of the pickle is damaged."""
    state = pickled({"weight": tensor(_Storage(12), 0, (3, 4), (4, 1))})
    path, refused = tmp_path / "a.pth", 0
    for position in range(len(state)):
        damaged = bytearray(state)
        damaged[position] ^= 0x15
        write_zip(path, bytes(damaged), {"0": bytes(48)})
        try:
            read_torch(path)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and str(path) in str(error)
    assert refused > len(state) // 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "zip format"),
        (b"<html>404: Not Found</html>", "zip format"),
        (pickle.dumps({"a": 1}), "zip format"),
        (b"PK\x03\x04" + bytes(100), "download it again"),
    ],
)
def test_refuses_what_is_not_a_zip_file(tmp_path, content, words):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_torch(path)
    assert_one_line(error, path, words)


def test_refuses_the_legacy_format(tmp_path):
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    path = tmp_path / "a.pth"
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError) as error:
        read_torch(path)
    assert_one_line(error, path, "zip format", "torch.save")


def test_refuses_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(ValueError) as error:
            read_torch(path)
        assert_one_line(error, path, "path")


def test_refuses_another_zip_file_and_a_compressed_one(tmp_path):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "hello")
    with pytest.raises(ValueError) as error:
        read_torch(path)
    assert_one_line(error, path, "torch.save")
    # A record of zeros, compressed, can be a thousand times larger than the file.
    state = {"a": tensor(_Storage(250_000), 0, (250_000,), (1,))}
    write_zip(path, pickled(state), {"0": bytes(10**6)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError) as error:
        read_torch(path)
    assert_one_line(error, path, "torch.save")


@pytest.mark.parametrize("top", [{"epoch": 3}, {"state_dict": {"a": [1]}}, [1, 2], {}, {1: 2}, {"model": {}}])
def test_refuses_a_file_without_a_state_dict(tmp_path, top):
    path = write_zip(tmp_path / "a.pth", pickled(top))
    with pytest.raises(ValueError) as error:
        read_torch(path)
    assert_one_line(error, path, "torch.save")


def test_a_name_with_line_breaks_stays_on_one_line(tmp_path):
    path = write_zip(tmp_path / "a.pth", pickled({"a\nb": 1}))
    with pytest.raises(ValueError) as error:
        read_torch(path)
    assert_one_line(error, path)


def test_checks_the_digest_in_the_name(tmp_path):
    data = good_file(tmp_path / "a.pth").read_bytes()
    right = tmp_path / f"resnet18-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    right.write_bytes(data)
    assert read_torch(right)["a"].shape == (100,)
    wrong = tmp_path / "resnet18-01234567.pth"
    wrong.write_bytes(data)
    with pytest.raises(ValueError) as error:
        read_torch(wrong)
    assert_one_line(error, wrong, "01234567", hashlib.sha256(data).hexdigest()[:8], "download it again")


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def norm_params(channels):
    return {"scale": shape(channels), "bias": shape(channels)}


def norm_statistics(channels):
    return {"mean": shape(channels), "var": shape(channels)}


def small_resnet():
    """The names of a bottleneck ResNet with two blocks, small; and torchvision's names for the same."""
    params = {
        "conv1": {"kernel": shape(7, 7, 3, 4)},
        "bn1": norm_params(4),
        "layer2_0": {
            "conv1": {"kernel": shape(1, 1, 4, 2)},
            "bn1": norm_params(2),
            "conv3": {"kernel": shape(1, 1, 2, 8)},
            "bn3": norm_params(8),
            "downsample_conv": {"kernel": shape(1, 1, 4, 8)},
            "downsample_bn": norm_params(8),
        },
        "layer3_22": {"conv2": {"kernel": shape(3, 2, 8, 6)}, "bn2": norm_params(6)},
    }
    batch_stats = {
        "bn1": norm_statistics(4),
        "layer2_0": {"bn1": norm_statistics(2), "bn3": norm_statistics(8), "downsample_bn": norm_statistics(8)},
        "layer3_22": {"bn2": norm_statistics(6)},
    }
    shapes = {"conv1.weight": (4, 3, 7, 7), "layer2.0.conv1.weight": (2, 4, 1, 1)}
    shapes |= {"layer2.0.conv3.weight": (8, 2, 1, 1), "layer2.0.downsample.0.weight": (8, 4, 1, 1)}
    shapes |= {"layer3.22.conv2.weight": (6, 8, 3, 2)}
    norms = {"bn1": 4, "layer2.0.bn1": 2, "layer2.0.bn3": 8, "layer2.0.downsample.1": 8, "layer3.22.bn2": 6}
    for name, channels in norms.items():
        shapes |= {f"{name}.{leaf}": (channels,) for leaf in ("weight", "bias", "running_mean", "running_var")}
    generator = np.random.default_rng(0)
    tensors = {name: generator.normal(size=size).astype(np.float32) for name, size in shapes.items()}
    return tensors, {"params": params, "batch_stats": batch_stats}


def test_convert_fills_every_leaf():
    tensors, variables = small_resnet()
    got = convert_resnet(tensors, variables)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), got) == jax.tree.map(lambda a: (a.shape, a.dtype), variables)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(got))
    params, batch_stats = got["params"], got["batch_stats"]
    block = params["layer2_0"]
    pairs = [
        (params["bn1"]["scale"], "bn1.weight"),
        (params["bn1"]["bias"], "bn1.bias"),
        (batch_stats["bn1"]["mean"], "bn1.running_mean"),
        (batch_stats["bn1"]["var"], "bn1.running_var"),
        (block["bn3"]["scale"], "layer2.0.bn3.weight"),
        (block["downsample_bn"]["bias"], "layer2.0.downsample.1.bias"),
        (batch_stats["layer2_0"]["downsample_bn"]["var"], "layer2.0.downsample.1.running_var"),
        (batch_stats["layer3_22"]["bn2"]["mean"], "layer3.22.bn2.running_mean"),
        (block["downsample_conv"]["kernel"][0, 0].T, "layer2.0.downsample.0.weight"),
    ]
    for leaf, name in pairs:
        np.testing.assert_array_equal(leaf, tensors[name].squeeze())
    kernel, weight = params["layer3_22"]["conv2"]["kernel"], tensors["layer3.22.conv2.weight"]
    for o, i, row, column in np.ndindex(*weight.shape):
        assert kernel[row, column, i, o] == weight[o, i, row, column]


@pytest.mark.parametrize(
    "extra", [{}, {"fc.weight": (1000, 8), "fc.bias": (1000,), "layer2.0.bn1.num_batches_tracked": ()}]
)
def test_convert_needs_neither_the_classifier_nor_the_counters(extra):
    tensors, variables = small_resnet()
    got = convert_resnet(tensors | {name: np.zeros(size, np.int64) for name, size in extra.items()}, variables)
    np.testing.assert_array_equal(got["params"]["bn1"]["scale"], tensors["bn1.weight"])


def test_convert_makes_everything_float32():
    tensors, variables = small_resnet()
    halves = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
    got = convert_resnet(halves, variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(got["params"]["bn1"]["bias"], halves["bn1.bias"].astype(np.float32))


@pytest.mark.parametrize("name", ["conv1.weight", "layer3.22.bn2.running_var", "layer2.0.downsample.0.weight"])
def test_convert_names_a_missing_tensor(name):
    tensors, variables = small_resnet()
    del tensors[name]
    with pytest.raises(ValueError, match=rf"missing 1: {name}\)") as error:
        convert_resnet(tensors, variables)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["fc.gain", "layer2.1.conv1.weight", "xfc.weight", "num_batches", "head.fc.bias", "a\nb"]
)
def test_convert_names_an_unexpected_tensor(name):
    tensors, variables = small_resnet()
    with pytest.raises(ValueError, match="unexpected 1: ") as error:
        convert_resnet(tensors | {name: np.zeros(3)}, variables)
    assert repr(name) in str(error.value) and "\n" not in str(error.value)


def test_convert_names_a_misshaped_tensor_and_both_shapes():
    tensors, variables = small_resnet()
    # The same number of elements, and the transposed order: nothing may be reshaped to fit.
    tensors["layer3.22.conv2.weight"] = tensors["layer3.22.conv2.weight"].transpose(0, 1, 3, 2)
    tensors["bn1.weight"] = tensors["bn1.weight"][None]
    with pytest.raises(ValueError, match="misshaped 2: ") as error:
        convert_resnet(tensors, variables)
    message = str(error.value)
    assert "layer3.22.conv2.weight is (6, 8, 2, 3) and should be (6, 8, 3, 2)" in message
    assert "bn1.weight is (1, 4) and should be (4,)" in message
    assert "\n" not in message


def test_convert_counts_all_faults_and_shows_the_first():
    _, variables = small_resnet()
    with pytest.raises(ValueError, match=r"missing 25: .*, \.\.\.; unexpected 1: 'a'") as error:
        convert_resnet({"a": np.zeros(1)}, variables)
    assert len(str(error.value)) < 300


def test_load_encoder_names_the_file(tmp_path):
    _, variables = small_resnet()
    path = good_file(tmp_path / "a.pth")
    with pytest.raises(ValueError) as error:
        load_encoder(path, variables)
    assert_one_line(error, path, "missing 25", "unexpected 1: 'a'")


def test_the_shared_weights_equal_what_torch_loads(shared):
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    path = shared / "weights" / "resnet18-9f26ff83.pth"
    got, expected = read_torch(path), torch.load(path, weights_only=True)
    assert list(got) == list(expected) and len(got) == 122
    for name, array in got.items():
        assert array.dtype == expected[name].numpy().dtype
        np.testing.assert_array_equal(array, expected[name].numpy())


def test_the_shared_weights_fill_the_encoder(shared):
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(ResNet().init, jax.random.key(0), image)
    path = shared / "weights" / "resnet18-9f26ff83.pth"
    got, tensors = load_encoder(path, variables), read_torch(path)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, variables)
    np.testing.assert_array_equal(
        got["params"]["layer4_0"]["downsample_conv"]["kernel"][0, 0],
        tensors["layer4.0.downsample.0.weight"][:, :, 0, 0].T,
    )


def test_refuses_numbers_of_the_other_byte_order(tmp_path):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickled({"a": tensor(_Storage(1), 0, (1,), (1,))}))
        archive.writestr("a/byteorder", "big")
        archive.writestr("a/data/0", struct.pack(">f", 1))
    with pytest.raises(ValueError) as error:
        read_torch(path)
    assert_one_line(error, path, "little-endian")
