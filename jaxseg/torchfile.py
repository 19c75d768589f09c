"""Files written by torch.save, zip and legacy, read without PyTorch and without executing anything in them."""

import collections
import hashlib
import io
import math
import mmap
import os
import pickle
import pickletools
import re
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

# The names torch.save gives to the types of storages, as (module, name) -> what it holds, little-endian.
_STORAGES = {
    ("torch", "FloatStorage"): np.dtype("<f4"),
    ("torch", "DoubleStorage"): np.dtype("<f8"),
    ("torch", "HalfStorage"): np.dtype("<f2"),
    ("torch", "BFloat16Storage"): np.dtype(jnp.bfloat16),
    ("torch", "LongStorage"): np.dtype("<i8"),
    ("torch", "IntStorage"): np.dtype("<i4"),
    ("torch", "ShortStorage"): np.dtype("<i2"),
    ("torch", "CharStorage"): np.dtype("i1"),
    ("torch", "ByteStorage"): np.dtype("u1"),
    ("torch", "BoolStorage"): np.dtype("?"),
}
_DAMAGED = "it is truncated, damaged, or not written by torch.save; download it again"
_SAVE_AGAIN = "in PyTorch, write it again with torch.save(model.state_dict(), path)"
# The legacy format starts with these two numbers, each in a pickle of its own.
_LEGACY = (0x1950A86A20F9469CFC6C, 1001)
# Longer names are cut where an error shows them.
_SHOWN = 80


class _Refused(Exception):
    """Why a file is refused, and the remedy, on one line; the file's name is added by `read_torch`."""


class _Storage(NamedTuple):
    """A flat piece of memory: in a zip file the record `data/<key>`, in a legacy file one of the pieces at its end."""

    kind: tuple[str, str]
    key: str
    size: int


class _Tensor(NamedTuple):
    """A view of a storage; offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """Builds plain records from what torch.save writes, and refuses every other class or function.

    A pickle may set attributes on whatever `find_class` returns, so it returns nothing worth changing: a built-in
    class, tuples of strings, and functions made anew each time.
    """

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Answers the names of the allowlist."""
        if (module, name) in _STORAGES:
            return (module, name)
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: _Tensor(storage, offset, shape, strides)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        asked = repr(f"{module}.{name}"[:_SHOWN])
        raise _Refused(f"it asks for {asked}, which is not part of a state_dict; {_SAVE_AGAIN}")

    def persistent_load(self, pid: Any) -> _Storage:
        """Answers a reference to a storage: ("storage", type, key, device, number of elements[, None])."""
        tag, kind, key, _, size, *view = pid
        if tag != "storage" or kind not in _STORAGES or type(key) is not str or type(size) is not int:
            raise _Refused(_DAMAGED)
        if view not in ([], [None]):
            raise _Refused(f"it holds views of storages, as PyTorch before 0.4 wrote them; {_SAVE_AGAIN}")
        storage = _Storage(kind, key, size)
        if self.storages.setdefault(key, storage) != storage:
            raise _Refused(f"it gives storage {_shown(key)} two types or sizes; {_DAMAGED}")
        return storage


def _unpickle(file: io.BytesIO | mmap.mmap) -> tuple[Any, dict[str, _Storage]]:
    """Reads one pickle and leaves the file behind it; returns its value and the storages that it names."""
    start, largest = file.tell(), 0
    # Walking over the operations also finds every string that claims to be longer than the file.
    for operation, argument, _ in pickletools.genops(file):
        if "PUT" in operation.name:
            largest = max(largest, argument)
    size = file.tell() - start
    # The unpickler makes room for as many values as the largest index says: 80 bytes could ask for 60 GB.
    if largest > size:
        raise _Refused(_DAMAGED)
    file.seek(start)
    unpickler = _Unpickler(io.BytesIO(file.read(size)))
    return unpickler.load(), unpickler.storages


def _as_array(name: str, tensor: _Tensor, data: bytes) -> np.ndarray:
    """Views a storage's bytes as a tensor; refuses one that reaches outside the storage."""
    storage, offset, shape, strides = tensor
    dtype = _STORAGES[storage.kind]
    numbers = (offset, *shape, *strides)
    if any(type(number) is not int or number < 0 for number in numbers) or len(shape) != len(strides):
        raise _Refused(f"tensor {_shown(name)} has no valid offset, shape and strides; {_DAMAGED}")
    # In Python's integers: NumPy's own check of strides can overflow.
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    inside = math.prod(shape) == 0 or last < storage.size
    if len(data) != storage.size * dtype.itemsize or not inside:
        raise _Refused(f"tensor {_shown(name)} reaches outside its storage of {len(data)} bytes; {_DAMAGED}")
    if math.prod(shape) == 0:
        return np.zeros(shape, dtype)
    byte_strides = [stride * dtype.itemsize for stride in strides]
    return np.ndarray(shape, dtype, data, offset * dtype.itemsize, byte_strides)


def _check_digest(file: Any, path: Path) -> None:
    """Compares a name such as resnet18-9f26ff83.pth, as torchvision gives, with the file's sha256."""
    # Eight digits without a letter are rather a date, and somebody's own file.
    expected = re.search(r"-(?=\d*[a-f])([0-9a-f]{8})\.pth?$", path.name)
    if expected is None:
        return
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(expected[1]):
        raise _Refused(
            f"its sha256 starts with {digest[:8]}, not with {expected[1]} as its name says; "
            "rename it if you changed it, or delete it and download it again"
        )


def _read_zip(file: BinaryIO) -> dict[str, np.ndarray]:
    """Reads the zip file that torch.save writes: a pickle, and a record of raw numbers for each storage."""
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        records, names = archive.infolist(), archive.namelist()
        roots = [name[: -len("data.pkl")] for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(roots) != 1 or any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise _Refused(f"it is a zip file, but not one of torch.save's; {_SAVE_AGAIN}")
        # Stored, not compressed, and not one inside the other: together no larger than the file.
        if sum(record.file_size for record in records) > size:
            raise _Refused(f"its records claim to be larger than the file's {size} bytes; {_DAMAGED}")
        if roots[0] + "byteorder" in names and archive.read(roots[0] + "byteorder") != b"little":
            raise _Refused(f"its numbers are not little-endian; {_SAVE_AGAIN} on another machine")
        top, _ = _unpickle(io.BytesIO(archive.read(roots[0] + "data.pkl")))
        tensors = _find_tensors(top)
        keys = {tensor.storage.key for tensor in tensors.values()}
        data = {key: archive.read(f"{roots[0]}data/{key}") for key in keys}
    return {name: _as_array(name, tensor, data[tensor.storage.key]) for name, tensor in tensors.items()}


def _read_legacy(file: mmap.mmap) -> dict[str, np.ndarray]:
    """Reads what torch.save wrote before PyTorch 1.6: five pickles, and then the storages, one after the other.

    The pickles are a magic number, a version, what the machine was like, the state_dict, and the storages' keys in the
    order in which they follow, each as its number of elements (int64) and the elements.
    """
    if any(_unpickle(file)[0] != number for number in _LEGACY):
        raise _Refused(f"it is not a file of torch.save's; {_SAVE_AGAIN}")
    machine, _ = _unpickle(file)
    if machine.get("little_endian") is not True:
        raise _Refused(f"its numbers are not little-endian; {_SAVE_AGAIN} on another machine")
    top, storages = _unpickle(file)
    tensors = _find_tensors(top)
    keys, _ = _unpickle(file)
    needed = {tensor.storage.key for tensor in tensors.values()}
    data = {}
    for key in keys:
        (number,) = struct.unpack("<q", file.read(8))
        length = number * _STORAGES[storages[key].kind].itemsize
        if not 0 <= length <= len(file) - file.tell():
            raise _Refused(f"a storage of {length} bytes reaches outside the file of {len(file)}; {_DAMAGED}")
        if key in needed:
            data[key] = file.read(length)
        else:
            file.seek(length, os.SEEK_CUR)
    return {name: _as_array(name, tensor, data[tensor.storage.key]) for name, tensor in tensors.items()}


def _find_tensors(top: Any) -> dict[str, _Tensor]:
    """Finds the state_dict: what was saved, or its entry `state_dict` or `model`."""
    for key in ("state_dict", "model"):
        if isinstance(top, dict) and isinstance(top.get(key), dict):
            top = top[key]
    if not isinstance(top, dict) or not top:
        raise _Refused(f"it holds no state_dict; {_SAVE_AGAIN}")
    for name, tensor in top.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor) or not isinstance(tensor.storage, _Storage):
            raise _Refused(f"its entry {_shown(name)} is not a tensor; {_SAVE_AGAIN}")
    return top


def _shown(name: Any) -> str:
    """Quotes a name of the file on one short line."""
    return repr(name[:_SHOWN]) if isinstance(name, str) else f"of type {type(name).__name__}"


def read_torch(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a file written by torch.save, without PyTorch and without executing anything in it.

    Args:
      path: a `.pth` or `.pt` file, zip (PyTorch 1.6 and later) or legacy, that holds a state_dict, or a dict with one
        under `state_dict` or `model`. If its name ends in `-<8 hexadecimal digits>.pth`, its sha256 must start so.

    Returns:
      name -> array of the tensor's shape and dtype (bfloat16 as ml_dtypes'), read-only.

    Raises:
      ValueError: the file is missing, damaged, not of this format, or holds anything but tensors; in one line.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            if magic != b"PK\x03\x04" and magic[:1] != pickle.PROTO:
                raise _Refused(f"it is neither a zip file nor a pickle, as torch.save writes them; {_SAVE_AGAIN}")
            _check_digest(file, path)
            if magic[:1] != pickle.PROTO:
                return _read_zip(file)
            # Mapped: reading more than there is allocates nothing.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                return _read_legacy(mapped)
    except _Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; give the path of a readable .pth file") from None
    except Exception:  # A damaged zip file or pickle can raise almost anything.
        raise ValueError(f"{path}: {_DAMAGED}") from None
