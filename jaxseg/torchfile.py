"""Files written by torch.save, zip and legacy, read without PyTorch and without executing anything in them."""

import hashlib
import io
import math
import mmap
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxseg.torchpickle import DAMAGED, SAVE_AGAIN, STORAGES, Refused, Tensor, read_pickle, shown

# The legacy format starts with these two numbers, each in a pickle of its own.
_LEGACY = (0x1950A86A20F9469CFC6C, 1001)
# NumPy's limit.
_MOST_AXES = 64
# Bytes of a storage that are skipped at once.
_CHUNK = 2**20


class _Piece(NamedTuple):
    """A part of a storage, in elements, that the named tensors share with each other and with no other tensor."""

    start: int
    stop: int
    names: list[str]


def _extent(name: str, tensor: Tensor) -> tuple[int, int]:
    """Checks a view; returns the place of its first element in its storage and that behind its last."""
    storage, offset, shape, strides = tensor
    if type(shape) is not tuple or type(strides) is not tuple or not len(shape) == len(strides) <= _MOST_AXES:
        raise Refused(f"tensor {shown(name)} has no valid shape and strides; {DAMAGED}")
    if any(type(number) is not int or not 0 <= number < 2**63 for number in (offset, *shape, *strides)):
        raise Refused(f"tensor {shown(name)} has no valid offset, shape and strides; {DAMAGED}")
    if math.prod(shape) == 0:
        return 0, 0
    # In Python's integers: NumPy's own check of strides can overflow.
    stop = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    if stop > storage.size:
        size = storage.size * STORAGES[storage.kind].itemsize
        raise Refused(f"tensor {shown(name)} reaches outside its storage of {size} bytes; {DAMAGED}")
    return offset, stop


def _cut(tensors: dict[str, Tensor]) -> dict[str, list[_Piece]]:
    """Cuts each storage into pieces, in order, so that a tensor's memory can be freed without its neighbours'."""
    extents = {name: _extent(name, tensor) for name, tensor in tensors.items()}
    pieces: dict[str, list[_Piece]] = {}
    for name in sorted(extents, key=extents.__getitem__):
        start, stop = extents[name]
        row = pieces.setdefault(tensors[name].storage.key, [])
        if row and start < row[-1].stop:
            row[-1].names.append(name)
            row[-1] = row[-1]._replace(stop=max(stop, row[-1].stop))
        else:
            row.append(_Piece(start, stop, [name]))
    return pieces


def _read_storage(
    read: Callable[[int], bytes], size: int, pieces: list[_Piece], tensors: dict[str, Tensor]
) -> dict[str, np.ndarray]:
    """Reads all of a storage, `size` bytes long, and returns the tensors in its pieces."""
    storage = tensors[pieces[0].names[0]].storage
    itemsize = STORAGES[storage.kind].itemsize
    if size != storage.size * itemsize:
        name = shown(pieces[0].names[0])
        raise Refused(f"tensor {name} reaches outside its storage of {size} bytes; {DAMAGED}")
    arrays: dict[str, np.ndarray] = {}
    place = 0
    # To the end: only there a zip file's reader compares a checksum.
    for start, stop, names in [*pieces, _Piece(storage.size, storage.size, [])]:
        while place < start * itemsize:
            place += len(_take(read, min(_CHUNK, start * itemsize - place)))
        data = _take(read, (stop - start) * itemsize)
        place += len(data)
        arrays |= {name: _as_array(tensors[name], data, start) for name in names}
    return arrays


def _take(read: Callable[[int], bytes], size: int) -> bytes:
    data = read(size)
    if len(data) != size:
        raise Refused(DAMAGED)
    return data


def _as_array(tensor: Tensor, data: bytes, start: int) -> np.ndarray:
    """Views a piece's bytes as a tensor; start: the place of the piece in the storage."""
    dtype = STORAGES[tensor.storage.kind]
    if math.prod(tensor.shape) == 0:
        return np.zeros(tensor.shape, dtype)
    byte_strides = [stride * dtype.itemsize for stride in tensor.strides]
    return np.ndarray(tensor.shape, dtype, data, (tensor.offset - start) * dtype.itemsize, byte_strides)


def _check_digest(file: Any, path: Path) -> None:
    """Compares a name such as resnet18-9f26ff83.pth, as torchvision gives, with the file's sha256."""
    # Eight digits without a letter are rather a date, and somebody's own file.
    expected = re.search(r"-(?=\d*[a-f])([0-9a-f]{8})\.pth?$", path.name)
    if expected is None:
        return
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(expected[1]):
        raise Refused(
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
            raise Refused(f"it is a zip file, but not one of torch.save's; {SAVE_AGAIN}")
        if len(set(names)) != len(names):
            raise Refused(f"two of its records have the same name; {DAMAGED}")
        # Stored, not compressed, and not one inside the other: together no larger than the file.
        if sum(record.file_size for record in records) > size:
            raise Refused(f"its records claim to be larger than the file's {size} bytes; {DAMAGED}")
        if not any(record.CRC for record in records):
            # torch.serialization.set_crc32_options(False) writes 0 for each; a record without one is not compared.
            for record in records:
                del record.CRC
        if roots[0] + "byteorder" in names and archive.read(roots[0] + "byteorder") != b"little":
            raise Refused(f"its numbers are not little-endian; {SAVE_AGAIN} on another machine")
        top, _ = read_pickle(io.BytesIO(archive.read(roots[0] + "data.pkl")))
        tensors = _find_tensors(top)
        arrays: dict[str, np.ndarray] = {}
        for key, pieces in _cut(tensors).items():
            with archive.open(f"{roots[0]}data/{key}") as stored:
                length = archive.getinfo(stored.name).file_size
                arrays |= _read_storage(stored.read, length, pieces, tensors)
    return {name: arrays[name] for name in tensors}


def _read_legacy(file: mmap.mmap) -> dict[str, np.ndarray]:
    """Reads what torch.save wrote before PyTorch 1.6: five pickles, and then the storages, one after the other.

    The pickles are a magic number, a version, what the machine was like, the state_dict, and the storages' keys in the
    order in which they follow, each as its number of elements (int64) and the elements.
    """
    if any(read_pickle(file)[0] != number for number in _LEGACY):
        raise Refused(f"it is not a file of torch.save's; {SAVE_AGAIN}")
    machine, _ = read_pickle(file)
    if machine.get("little_endian") is not True:
        raise Refused(f"its numbers are not little-endian; {SAVE_AGAIN} on another machine")
    top, storages = read_pickle(file)
    keys, _ = read_pickle(file)
    if type(keys) is not list or not all(type(key) is str for key in keys) or len(set(keys)) != len(keys):
        raise Refused(DAMAGED)
    tensors = _find_tensors(top)
    arrays: dict[str, np.ndarray] = {}
    pieces = _cut(tensors)
    for key in keys:
        (number,) = struct.unpack("<q", file.read(8))
        length = number * STORAGES[storages[key].kind].itemsize
        if not 0 <= length <= len(file) - file.tell():
            raise Refused(f"a storage of {length} bytes reaches outside the file of {len(file)}; {DAMAGED}")
        behind = file.tell() + length
        if key in pieces:
            arrays |= _read_storage(file.read, length, pieces[key], tensors)
        file.seek(behind)
    return {name: arrays[name] for name in tensors}


def _find_tensors(top: Any) -> dict[str, Tensor]:
    """Finds the state_dict: what was saved, or its entry `state_dict` or `model`."""
    for key in ("model", "state_dict", "model"):
        if isinstance(top, dict) and isinstance(top.get(key), dict):
            top = top[key]
    if not isinstance(top, dict) or not top:
        raise Refused(f"it holds no state_dict; {SAVE_AGAIN}")
    for name, tensor in top.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise Refused(f"its entry {shown(name)} is not a tensor; {SAVE_AGAIN}")
    return top


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
            # First, so that of a download the right thing is said whatever its bytes are.
            _check_digest(file, path)
            file.seek(0)
            magic = file.read(4)
            if magic != b"PK\x03\x04" and magic[:1] != pickle.PROTO:
                raise Refused(f"it is neither a zip file nor a pickle, as torch.save writes them; {SAVE_AGAIN}")
            if magic[:1] != pickle.PROTO:
                return _read_zip(file)
            # Mapped: reading more than there is allocates nothing.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                return _read_legacy(mapped)
    except Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; give the path of a readable .pth file") from None
    except MemoryError:
        raise ValueError(f"{path}: there is not enough memory to read it; end other programs") from None
    except Exception:  # A damaged zip file or pickle can raise almost anything.
        raise ValueError(f"{path}: {DAMAGED}") from None
