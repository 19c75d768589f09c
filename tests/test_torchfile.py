"""torchfile.py against torch.save and torch.load, and against files made to do harm."""

import collections
import copy
import hashlib
import io
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from jaxseg import torchfile
from jaxseg.torchfile import read_torch

NEEDS_TORCH = "needs torch==2.13.0 (CPU build)"


both_formats = pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])


def write_zip(path, pickled, records=None, compression=zipfile.ZIP_STORED):
    """Writes a file laid out as torch.save does."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for key, data in (records or {}).items():
            archive.writestr(f"archive/data/{key}", data)
    return path


def write_legacy(path, pickled, storages=(), start=0x1950A86A20F9469CFC6C, little_endian=True):
    """Writes a file laid out as torch.save did before PyTorch 1.6; storages: (key, number of elements, bytes)."""
    machine = {"protocol_version": 1001, "little_endian": little_endian, "type_sizes": {"int": 4}}
    keys = [key for key, _, _ in storages]
    heads = [pickle.dumps(value, 2) for value in (start, 1001, machine)]
    data = [struct.pack("<q", number) + content for _, number, content in storages]
    path.write_bytes(b"".join([*heads, pickled, pickle.dumps(keys, 2), *data]))
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
@both_formats
def test_round_trip_of_every_dtype(tmp_path, dtype, is_zip):
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    expected = (torch.arange(24).reshape(2, 3, 4) - 5).to(getattr(torch, dtype))
    torch.save({"a": expected}, tmp_path / "a.pth", _use_new_zipfile_serialization=is_zip)
    got = read_torch(tmp_path / "a.pth")["a"]
    assert got.dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype))
    np.testing.assert_array_equal(got.astype(np.float64), expected.to(torch.float64).numpy())


@both_formats
def test_round_trip_of_views_and_parameters(tmp_path, is_zip):
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
    torch.save(collections.OrderedDict(state), tmp_path / "a.pth", _use_new_zipfile_serialization=is_zip)
    got = read_torch(tmp_path / "a.pth")
    assert list(got) == list(state)
    for name, expected in state.items():
        np.testing.assert_array_equal(got[name], expected.detach().numpy())


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"other": s["1.bias"] + 1, "state_dict": s, "epoch": 3}, lambda s: {"model": s}]
)
@both_formats
def test_unwraps_the_state_dict_of_a_module(tmp_path, wrap, is_zip):
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    torch.save(wrap(module.state_dict()), tmp_path / "a.pth", _use_new_zipfile_serialization=is_zip)
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


def good_file(path, is_zip=True):
    state = pickled({"a": tensor(_Storage(100), 0, (100,), (1,))})
    if is_zip:
        return write_zip(path, state, {"0": bytes(400)})
    return write_legacy(path, state, [("0", 100, bytes(400))])


@both_formats
def test_refuses_a_truncated_file_at_every_length(tmp_path, is_zip):
    whole = good_file(tmp_path / "whole.pth", is_zip).read_bytes()
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
        (b"", "neither a zip file nor a pickle"),
        (b"<html>404: Not Found</html>", "neither a zip file nor a pickle"),
        (pickle.dumps({"a": 1}), "not a file of torch.save's"),
        (b"PK\x03\x04" + bytes(100), "download it again"),
    ],
)
def test_refuses_what_torch_does_not_write(tmp_path, content, words):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_torch(path)
    assert_one_line(error, path, words)


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
    wrong = tmp_path / "resnet18-0123456f.pth"
    wrong.write_bytes(data)
    with pytest.raises(ValueError) as error:
        read_torch(wrong)
    assert_one_line(error, wrong, "0123456f", hashlib.sha256(data).hexdigest()[:8], "download it again")


def test_a_date_in_the_name_is_no_digest(tmp_path):
    assert read_torch(good_file(tmp_path / "mine-20240131.pth"))["a"].shape == (100,)


def test_the_shared_weights_equal_what_torch_loads(shared):
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    path = shared / "weights" / "resnet18-9f26ff83.pth"
    got, expected = read_torch(path), torch.load(path, weights_only=True)
    assert list(got) == list(expected) and len(got) == 122
    for name, array in got.items():
        assert array.dtype == expected[name].numpy().dtype
        np.testing.assert_array_equal(array, expected[name].numpy())


def test_refuses_numbers_of_the_other_byte_order(tmp_path):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickled({"a": tensor(_Storage(1), 0, (1,), (1,))}))
        archive.writestr("a/byteorder", "big")
        archive.writestr("a/data/0", struct.pack(">f", 1))
    with pytest.raises(ValueError) as error:
        read_torch(path)
    assert_one_line(error, path, "little-endian")


def test_reads_what_the_legacy_format_says_without_torch(tmp_path):
    """Storages are found by their order, also those behind one that no tensor of the state_dict needs."""
    numbers = np.arange(6, dtype="<f4")
    state = {"a": tensor(_Storage(4, "x"), 1, (3,), (1,)), "b": tensor(_Storage(2, "z", "LongStorage"), 0, (2,), (1,))}
    top = {"momentum": tensor(_Storage(3, "y"), 0, (3,), (1,)), "model": state}
    integers = np.array([2**40, -1], "<i8")
    storages = [
        ("y", 3, numbers[:3].tobytes()), ("z", 2, integers.tobytes()), ("x", 4, numbers[2:].tobytes())
    ]  # fmt: skip
    got = read_torch(write_legacy(tmp_path / "a.pt", pickled(top), storages))
    assert list(got) == ["a", "b"]
    np.testing.assert_array_equal(got["a"], [3, 4, 5])
    np.testing.assert_array_equal(got["b"], integers)


@pytest.mark.parametrize(
    ("storages", "words"),
    [
        ([("0", 13, bytes(48))], "outside the file"),
        ([("0", 2**40, bytes(48))], "outside the file"),
        ([("0", -1, bytes(48))], "outside the file"),
        ([("0", 11, bytes(48))], "outside its storage"),
        ([], "download it again"),
        ([("1", 12, bytes(48))], "download it again"),
        ([(["0"], 12, bytes(48))], "download it again"),
    ],
)
def test_refuses_a_legacy_storage_that_is_not_in_the_file(tmp_path, storages, words):
    path = write_legacy(tmp_path / "a.pth", pickled({"weight": tensor(_Storage(12), 0, (12,), (1,))}), storages)
    with pytest.raises(ValueError) as error:
        read_torch(path)
    assert_one_line(error, path, words)


def test_refuses_a_legacy_file_of_another_start_or_byte_order(tmp_path):
    state, storages = pickled({"a": tensor(_Storage(1), 0, (1,), (1,))}), [("0", 1, bytes(4))]
    path = tmp_path / "a.pth"
    assert read_torch(write_legacy(path, state, storages))["a"] == 0
    for options, words in (({"start": 1}, "torch.save"), ({"little_endian": False}, "little-endian")):
        write_legacy(path, state, storages, **options)
        with pytest.raises(ValueError) as error:
            read_torch(path)
        assert_one_line(error, path, words)


@pytest.mark.parametrize("position", range(4))
def test_executes_no_part_of_a_legacy_file(tmp_path, position):
    """The attack stands for each of the four first pickles in turn."""
    witness = tmp_path / "witness"
    attack = pickled(_Global("os", "system", f"touch {witness}"))
    machine = {"little_endian": True}
    pickles = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, machine, {})]
    pickles[position] = attack
    path = tmp_path / "a.pth"
    path.write_bytes(b"".join(pickles))
    with pytest.raises(ValueError) as error:
        read_torch(path)
    assert_one_line(error, path, "os.system")
    assert not witness.exists()


@both_formats
def test_refuses_a_pickle_that_asks_for_more_memory_than_the_file_has(tmp_path, is_zip):
    """Python's unpickler keeps an array as long as the largest index: a few bytes ask for gigabytes. So do lengths."""
    bombs = [
        b"\x80\x02}" + pickle.LONG_BINPUT + struct.pack("<I", 10**7) + b".",
        b"\x80\x02}" + pickle.PUT + b"10000000\n.",
        b"\x80\x05" + pickle.BYTEARRAY8 + struct.pack("<Q", 10**7) + b".",
        b"\x80\x04" + pickle.BINUNICODE8 + struct.pack("<Q", 10**7) + b".",
    ]
    path = tmp_path / "a.pth"
    for bomb in bombs:
        write_zip(path, bomb) if is_zip else write_legacy(path, bomb)
        tracemalloc.start()
        with pytest.raises(ValueError) as error:
            read_torch(path)
        assert tracemalloc.get_traced_memory()[1] < 10**6
        tracemalloc.stop()
        assert_one_line(error, path, "again")


# A tuple in a tuple in a tuple, and a tuple of two that are each the tuple before.
DEEP = b")" + b"\x85" * 150_000
DOUBLED = b")" + b"q\x00h\x00\x86" * 40
LONG = b"X" + struct.pack("<I", 10**6) + b"a" * 10**6
HUGE = b"\x8b" + struct.pack("<I", 10**6) + b"\x01" * 10**6
HOSTILE = {
    "a very deep key": b"\x80\x02})" + b"\x85" * 10**6 + b"K\x01s.",
    "a deep key": b"\x80\x02}" + DEEP + b"K\x01s.",
    "a doubled key": b"\x80\x02})" + b"2\x86" * 40 + b"K\x01s.",
    "a doubled key, by the memo": b"\x80\x02}" + DOUBLED + b"K\x01s.",
    "a deep key of several": b"\x80\x02}(" + DEEP + b"K\x01u.",
    "a deep value": b"\x80\x02}X\x01\x00\x00\x00a" + DEEP + b"s.",
    "a deep key of an OrderedDict": b"\x80\x02ccollections\nOrderedDict\n](" + DEEP + b"K\x01\x86e\x85R.",
    "a deep key of attributes": b"\x80\x02}}" + DEEP + b"K\x01sb.",
    "a deep type of storage": b"\x80\x02(X\x07\x00\x00\x00storage" + DEEP + b"X\x01\x00\x00\x000NK\x01tQ.",
    "a deep key of a storage": b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + DEEP + b"NK\x01tQ.",
    "a deep shape": pickled({"a": tensor(_Storage(1), 0, (), ())}).replace(b"K\x00))", b"K\x00" + DEEP + b")"),
    "a deep set": b"\x80\x04\x8f(" + DEEP + b"\x90.",
    "a deep frozenset": b"\x80\x04(" + DEEP + b"\x91.",
    "one list for many dicts": b"\x80\x02](" + b"X\x01\x00\x00\x00aK\x01\x86" * 30_000 + b"eq\x00("
    + b"ccollections\nOrderedDict\nh\x00\x85R" * 30_000 + b"t.",
    "two long names, again and again": b"\x80\x02}(" + LONG + b"q\x00N" + LONG + b"q\x01N"
    + b"h\x00Nh\x01N" * 200_000 + b"u.",
    "a long size of a storage, again and again": b"\x80\x02" + b"".join(
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000N" + HUGE + b"tq" + number
        for number in (b"\x00", b"\x01")
    ) + b"h\x00Q0h\x01Q0" * 100_000 + b".",
    "keys of one hash": b"\x80\x02}("
    + b"".join(pickle.dumps(number * (2**61 - 1), 2)[2:-1] + b"N" for number in range(150_000)) + b"u.",
}  # fmt: skip


def test_a_legacy_file_cannot_name_a_storage_again_and_again(tmp_path):
    names = {f"t{i}": tensor(_Storage(0), 0, (0,), (1,)) for i in range(4000)}
    path = write_legacy(tmp_path / "a.pth", pickled(names), [("0", 0, b"")] * 4000)
    with pytest.raises(ValueError) as error:
        read_torch(path)
    assert_one_line(error, path, "damaged")


def test_refuses_two_records_of_one_name(tmp_path):
    path = good_file(tmp_path / "a.pth")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        name = next(name for name in archive.namelist() if "/data/" in name)
        archive.writestr(name, bytes(archive.getinfo(name).file_size))
    with pytest.raises(ValueError) as error:
        read_torch(path)
    assert_one_line(error, path, "the same name")


@both_formats
def test_refuses_a_tensor_whose_sign_changes_when_it_is_read(tmp_path, is_zip):
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    path, lazy = tmp_path / "a.pth", torch.complex(torch.zeros(4), torch.ones(4)).conj().imag
    torch.save({"a": lazy}, path, _use_new_zipfile_serialization=is_zip)
    assert (torch.load(path)["a"] == -1).all()
    with pytest.raises(ValueError) as error:
        read_torch(path)
    assert_one_line(error, path, "negated", "clone()")
    torch.save({"a": lazy.clone()}, path, _use_new_zipfile_serialization=is_zip)
    assert (read_torch(path)["a"] == -1).all()


def test_a_pickle_cannot_keep_the_reader_busy_or_overflow_its_stack(tmp_path):
    """Each of these ends Python's own unpickler, or keeps it for hours: so in a process of its own, with a limit."""
    names = [(write_zip(tmp_path / f"{i}.pth", HOSTILE[name]).name, name) for i, name in enumerate(HOSTILE)]
    names.append((write_legacy(tmp_path / "legacy.pth", HOSTILE["a deep key"]).name, "a deep key of a legacy file"))
    keys = good_file(tmp_path / "keys.pth", is_zip=False)
    keys.write_bytes(keys.read_bytes().replace(pickle.dumps(["0"], 2), b"\x80\x02](" + DEEP + b"e."))
    names.append((keys.name, "a deep key of a legacy file's storages"))
    code = """if True:
        import sys
        from jaxseg.torchfile import read_torch
        for line in sys.stdin.read().splitlines():
            print(line, flush=True)
            try:
                read_torch(line)
            except ValueError as error:
                print(error, flush=True)
    """
    process = subprocess.run(
        [sys.executable, "-c", code],
        input="\n".join(str(tmp_path / file) for file, _ in names),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    lines = process.stdout.splitlines()
    assert process.returncode == 0, (lines[-1:], names, process.stderr)
    for (file, name), asked, answer in zip(names, lines[::2], lines[1::2], strict=True):
        assert asked == str(tmp_path / file) and answer.startswith(f"{asked}: ") and len(answer) < 500, name
        assert "again" in answer, name


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_every_protocol_of_the_pickler(tmp_path, protocol):
    """Also what stands beside a state_dict: numbers of every length, texts, lists, dicts."""
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    beside = {
        "epoch": 3,
        7: [1.5, -1, 300, 70_000, 2**40, -(2**100), True, None, *([b"x", b"x" * 300] if protocol > 2 else [])],
    }
    beside |= {"name": "é" * 300, "nested": {"betas": (0.9, 0.999), "empty": ((), [], {})}, "4": (1, 2, 3, 4)}
    state = torch.nn.Conv2d(3, 4, 3).state_dict()
    torch.save({"state_dict": state, **beside}, tmp_path / "a.pth", pickle_protocol=protocol)
    got = read_torch(tmp_path / "a.pth")
    for name, expected in state.items():
        np.testing.assert_array_equal(got[name], expected.numpy())


def test_reads_what_python_2_wrote(tmp_path):
    """Its OrderedDict is a list of pairs, and its texts are bytes."""
    name, numbers = b"U\x01a", np.arange(3, dtype="<f4")
    call = pickled(tensor(_Storage(3), 0, (3,), (1,)))[2:-1]
    state = b"\x80\x02ccollections\nOrderedDict\n](](" + name + call + b"ee\x85R."
    path = write_legacy(tmp_path / "a.pth", state, [("0", 3, numbers.tobytes())])
    np.testing.assert_array_equal(read_torch(path)["a"], numbers)


def test_refuses_records_that_together_are_larger_than_the_file(tmp_path):
    """A zip bomb without compression: many entries of the directory show the same bytes."""
    keys = [str(number) for number in range(50)]
    state = {f"weight{key}": tensor(_Storage(25_000, key), 0, (25_000,), (1,)) for key in keys}
    path = write_zip(tmp_path / "a.pth", pickled(state), {"0": bytes(100_000)})
    with zipfile.ZipFile(path, "a") as archive:
        first = archive.getinfo("archive/data/0")
        for key in keys[1:]:
            entry = copy.copy(first)
            entry.filename = f"archive/data/{key}"
            archive.filelist.append(entry)
            archive.NameToInfo[entry.filename] = entry
        archive._didModify = True
    assert path.stat().st_size < 200_000
    with pytest.raises(ValueError) as error:
        read_torch(path)
    assert_one_line(error, path, "claim to be larger")


@both_formats
def test_refuses_one_storage_of_two_types(tmp_path, is_zip):
    state = {
        "a": tensor(_Storage(2), 0, (2,), (1,)),
        "b": tensor(_Storage(2, kind="IntStorage"), 0, (2,), (1,)),
    }
    path = tmp_path / "a.pth"
    write_zip(path, pickled(state), {"0": bytes(8)}) if is_zip else write_legacy(
        path, pickled(state), [("0", 2, bytes(8))]
    )
    with pytest.raises(ValueError) as error:
        read_torch(path)
    assert_one_line(error, path, "'0'", "two types")


@both_formats
def test_pieces_of_a_storage_that_nobody_shows_are_skipped(tmp_path, is_zip):
    """And tensors that share elements with one neighbour and not with the other come out right."""
    numbers = np.arange(10**6, dtype="<f2")
    views = {
        "late": (900_000, 3),
        "early": (5, 3),
        "over": (6, 5),
        "again": (5, 3),
        "empty": (7, 0),
        "last": (10**6 - 1, 1),
    }
    storage = _Storage(10**6, kind="HalfStorage")
    state = pickled({name: tensor(storage, start, (size,), (1,)) for name, (start, size) in views.items()})
    path = tmp_path / "a.pth"
    if is_zip:
        write_zip(path, state, {"0": numbers.tobytes()})
    else:
        write_legacy(path, state, [("0", 10**6, numbers.tobytes())])
    got = read_torch(path)
    assert list(got) == list(views)
    for name, (start, size) in views.items():
        np.testing.assert_array_equal(got[name], numbers[start : start + size])
    assert np.shares_memory(got["early"], got["over"]) and not np.shares_memory(got["early"], got["late"])


@pytest.mark.parametrize("position", [0, 40_000, 99_999])
def test_a_changed_byte_of_a_zip_file_is_noticed_wherever_it_is(tmp_path, position):
    """Also behind and before what the tensors show."""
    state = pickled({"a": tensor(_Storage(100_000, kind="ByteStorage"), 30_000, (20_000,), (1,))})
    path = write_zip(tmp_path / "a.pth", state, {"0": b"\x07" * 100_000})
    assert (read_torch(path)["a"] == 7).all()
    content = bytearray(path.read_bytes())
    content[content.index(b"\x07" * 100_000) + position] = 8
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_torch(path)
    assert_one_line(error, path, "download it again")


def test_reads_a_file_without_checksums(tmp_path):
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(5)}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        assert not any(record.CRC for record in archive.infolist())
    np.testing.assert_array_equal(read_torch(tmp_path / "a.pth")["a"], np.arange(5))


def test_too_little_memory_is_no_damage(tmp_path, monkeypatch):
    def read(*_):
        raise MemoryError

    path = good_file(tmp_path / "a.pth")
    monkeypatch.setattr(torchfile, "read_pickle", read)
    with pytest.raises(ValueError) as error:
        read_torch(path)
    assert_one_line(error, path, "not enough memory")
    assert "damaged" not in str(error.value)


def test_long_names_are_cut(tmp_path):
    path = write_zip(tmp_path / "a.pth", pickled({"a" * 10**5: 1}))
    with pytest.raises(ValueError) as error:
        read_torch(path)
    assert_one_line(error, path, "aaaa")
    assert len(str(error.value)) < 500
