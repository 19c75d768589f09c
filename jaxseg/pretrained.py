"""Pretrained weights: torchvision's `.pth` files, read without PyTorch, into Flax variables, strictly."""

import collections
import hashlib
import math
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

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
# A torchvision ResNet has them, an encoder has no use for them; older files lack the counters.
_NOT_NEEDED = re.compile(r"fc\.(weight|bias)|(.*\.)?num_batches_tracked")
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_SHOWN = 3


class _Refused(Exception):
    """Why a file is refused, and the remedy, on one line; the file's name is added by `read_torch`."""


class _Storage(NamedTuple):
    """A flat piece of memory, kept in the zip's record `data/<key>`."""

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
        raise _Refused(f"it asks for {module + '.' + name!r}, which is not part of a state_dict; {_SAVE_AGAIN}")

    def persistent_load(self, pid: Any) -> _Storage:
        """Answers a reference to a storage: ("storage", type, key, device, number of elements)."""
        tag, kind, key, _, size = pid
        if tag != "storage" or kind not in _STORAGES or type(key) is not str or type(size) is not int:
            raise _Refused(_DAMAGED)
        return _Storage(kind, key, size)


def _as_array(name: str, tensor: _Tensor, data: bytes) -> np.ndarray:
    """Views a storage's bytes as a tensor; refuses one that reaches outside the storage."""
    storage, offset, shape, strides = tensor
    dtype = _STORAGES[storage.kind]
    numbers = (offset, *shape, *strides)
    if any(type(number) is not int or number < 0 for number in numbers) or len(shape) != len(strides):
        raise _Refused(f"tensor {name!r} has no valid offset, shape and strides; {_DAMAGED}")
    # In Python's integers: NumPy's own check of strides can overflow.
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    inside = math.prod(shape) == 0 or last < storage.size
    if len(data) != storage.size * dtype.itemsize or not inside:
        raise _Refused(f"tensor {name!r} reaches outside its storage of {len(data)} bytes; {_DAMAGED}")
    if math.prod(shape) == 0:
        return np.zeros(shape, dtype)
    byte_strides = [stride * dtype.itemsize for stride in strides]
    return np.ndarray(shape, dtype, data, offset * dtype.itemsize, byte_strides)


def _check_digest(file: Any, path: Path) -> None:
    """Compares a name such as resnet18-9f26ff83.pth, as torchvision gives, with the file's sha256."""
    expected = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if expected is None:
        return
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(expected[1]):
        raise _Refused(
            f"its sha256 starts with {digest[:8]}, not with {expected[1]} as its name says; "
            "download it again, or rename it if you changed it"
        )


def _read_zip(file: Any) -> dict[str, np.ndarray]:
    """Reads the zip file that torch.save writes: a pickle, and a record of raw numbers for each storage."""
    with zipfile.ZipFile(file) as archive:
        roots = [name[: -len("data.pkl")] for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name)]
        # Stored, not compressed, so that no record is larger than the file.
        if len(roots) != 1 or any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise _Refused(f"it is a zip file, but not one of torch.save's; {_SAVE_AGAIN}")
        if roots[0] + "byteorder" in archive.namelist() and archive.read(roots[0] + "byteorder") != b"little":
            raise _Refused(f"its numbers are not little-endian; {_SAVE_AGAIN} on another machine")
        with archive.open(roots[0] + "data.pkl") as pickled:
            top = _Unpickler(pickled).load()
        tensors = _find_tensors(top)
        keys = {tensor.storage.key for tensor in tensors.values()}
        records = {key: archive.read(f"{roots[0]}data/{key}") for key in keys}
    return {name: _as_array(name, tensor, records[tensor.storage.key]) for name, tensor in tensors.items()}


def _find_tensors(top: Any) -> dict[str, _Tensor]:
    """Finds the state_dict: what was saved, or its entry `state_dict` or `model`."""
    for key in ("state_dict", "model"):
        if isinstance(top, dict) and isinstance(top.get(key), dict):
            top = top[key]
    if not isinstance(top, dict) or not top:
        raise _Refused(f"it holds no state_dict; {_SAVE_AGAIN}")
    for name, tensor in top.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor) or not isinstance(tensor.storage, _Storage):
            raise _Refused(f"its entry {name!r} is not a tensor; {_SAVE_AGAIN}")
    return top


def read_torch(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a file written by torch.save, without PyTorch and without executing anything in it.

    Args:
      path: a `.pth` file in the zip format (PyTorch 1.6 or later) that holds a state_dict, or a dict with one under
        `state_dict` or `model`. If its name ends in `-<8 hexadecimal digits>.pth`, its sha256 must start with them.

    Returns:
      name -> array of the tensor's shape and dtype (bfloat16 as ml_dtypes'), read-only.

    Raises:
      ValueError: the file is missing, damaged, not of this format, or holds anything but tensors; in one line.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                raise _Refused(f"it is not in the zip format of PyTorch 1.6 and later; {_SAVE_AGAIN}")
            _check_digest(file, path)
            return _read_zip(file)
    except _Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; give the path of a readable .pth file") from None
    except Exception:  # A damaged zip file or pickle can raise almost anything.
        raise ValueError(f"{path}: {_DAMAGED}") from None


def _torch_name(path: tuple[str, ...]) -> str:
    """Renames a leaf: (params, layer2_0, downsample_bn, scale) -> layer2.0.downsample.1.weight."""
    module = ".".join(path[1:-1])
    module = re.sub(r"^layer(\d+)_(\d+)\b", r"layer\1.\2", module)
    module = module.replace("downsample_conv", "downsample.0").replace("downsample_bn", "downsample.1")
    return f"{module}.{_LEAVES[path[-1]]}"


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Turns the shape of a kernel from HWIO into PyTorch's OIHW; other shapes are the same in both."""
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else tuple(shape)


def _some(title: str, items: list[str]) -> list[str]:
    """Lists the first few on one line: ["missing 5: a, b, c, ..."], or nothing if there are none."""
    shown = ", ".join(items[:_SHOWN]) + (", ..." if len(items) > _SHOWN else "")
    return [f"{title} {len(items)}: {shown}"] if items else []


def convert_resnet(tensors: dict[str, np.ndarray], variables: dict[str, Any]) -> dict[str, Any]:
    """Turns a torchvision ResNet of any depth into Flax variables.

    Args:
      tensors: torchvision's names -> arrays; `fc.weight`, `fc.bias` and `*.num_batches_tracked` are not needed.
      variables: `{"params": ..., "batch_stats": ...}` of the ResNet, for its names and shapes only: arrays, or what
        `jax.eval_shape` gives.

    Returns:
      variables of the same structure, every leaf a float32 NumPy array.

    Raises:
      ValueError: a tensor is missing, unexpected or of another shape; one line names them and both shapes.
    """
    template = traverse_util.flatten_dict(variables)
    names = {path: _torch_name(path) for path in template}
    wanted = {names[path]: _torch_shape(leaf.shape) for path, leaf in template.items()}
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted and not _NOT_NEEDED.fullmatch(name)]
    misshaped = [
        f"{name} is {tensors[name].shape} and should be {shape}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    faults = _some("missing", missing) + _some("unexpected", [repr(name) for name in unexpected])
    faults += _some("misshaped", misshaped)
    if faults:
        raise ValueError(f"the tensors do not fit ({'; '.join(faults)}); give torchvision's weights of the same ResNet")

    flat = {}
    for path, name in names.items():
        array = tensors[name]
        flat[path] = np.array(array.transpose(2, 3, 1, 0) if array.ndim == 4 else array, np.float32, order="C")
    return traverse_util.unflatten_dict(flat)


def load_encoder(path: str | Path, variables: dict[str, Any]) -> dict[str, Any]:
    """Loads torchvision's weights into the variables of a ResNet encoder.

    Args:
      path: a `.pth` file; see `read_torch`.
      variables: `{"params": ..., "batch_stats": ...}` of the encoder alone; see `convert_resnet`.

    Returns:
      variables of the same structure, every leaf a float32 NumPy array from the file.

    Raises:
      ValueError: the file cannot be read or does not fit; one line names it and the remedy.
    """
    tensors = read_torch(path)
    try:
        return convert_resnet(tensors, variables)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
