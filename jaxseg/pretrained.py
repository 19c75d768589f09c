"""Pretrained encoders: torchvision's and timm's weights, or those of a run of ours, <-> Flax variables, strictly."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from jaxseg import checkpoint
from jaxseg.download import fetch
from jaxseg.resnet import VARIANTS, Bottleneck
from jaxseg.torchfile import read_torch

# torchvision's IMAGENET1K_V1 files; the eight digits are how their sha256 starts.
IMAGENET_URL = "https://download.pytorch.org/models/"
IMAGENET_FILES = {
    "resnet18": "resnet18-f37072fd.pth",
    "resnet34": "resnet34-b627a593.pth",
    "resnet50": "resnet50-0676ba61.pth",
    "resnet101": "resnet101-63fe2227.pth",
    "resnet152": "resnet152-394f9c45.pth",
}
# A classifier has them, an encoder has no use for them; older files lack the counters.
_NOT_NEEDED = re.compile(r"fc\.(weight|bias)|(.*\.)?num_batches_tracked")
_PREFIXED = re.compile(r"((?:(?:module|encoder|backbone)\.)*)(?:conv1|bn1|layer[1-4])\..*", re.DOTALL)
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_SAFETENSORS_TYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}
# What an error shows of many tensors, and of a long name.
_SHOWN, _LONGEST = 4, 160


def load_encoder(
    name: str, weights: str | Path, *, base_url: str = IMAGENET_URL, cache: Path | None = None
) -> dict[str, Any]:
    """Loads weights into the variables of a ResNet encoder; no file's code is executed.

    Args:
      name: the encoder, a key of `jaxseg.resnet.VARIANTS`.
      weights: one of
        'imagenet': torchvision's ImageNet weights (V1), downloaded unless they are in the cache;
        a `.pth` or `.pt` file, see `jaxseg.torchfile.read_torch`;
        a `.safetensors` file with torchvision's or timm's names;
        the workdir of a run of ours, or its folder of checkpoints: the encoder of the best checkpoint.
        The names in a file may have a prefix of `module.`, `encoder.` and `backbone.`.
      base_url: where 'imagenet' is downloaded from; ends in a slash.
      cache: where downloads are kept; `jaxseg.download.cache_folder()` if None.

    Returns:
      `{"params": ..., "batch_stats": ...}` of `jaxseg.resnet.ResNet(name)`, every leaf a float32 NumPy array.

    Raises:
      ValueError: the weights cannot be downloaded or read or do not fit; one line names the file and the remedy.
    """
    _check_name(name)
    path = fetch(IMAGENET_FILES[name], base_url, cache) if str(weights) == "imagenet" else Path(weights)
    return _named(path, convert_resnet, _read(path), name)


def load_model(name: str, path: str | Path, variables: Any) -> dict[str, Any]:
    """Loads all of a run's best checkpoint, the encoder and the decoder.

    Args:
      name: the encoder, a key of `jaxseg.resnet.VARIANTS`.
      path: the run's workdir, or its folder of checkpoints.
      variables: `{"params": ..., "batch_stats": ...}` of the segmenter, for the decoder's names and shapes.

    Returns:
      Variables of the same structure, every leaf a float32 NumPy array.

    Raises:
      ValueError: there is no such checkpoint, or its encoder or decoder is another one; in one line.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not the workdir of a run: of other weights only the encoder can be taken")
    saved = checkpoint.read_best(path)
    encoder = _named(path, convert_resnet, to_torch(_part(saved, "encoder")), name)
    decoder = _named(path, _check_decoder, _part(saved, "decoder"), _part(variables, "decoder"))
    return {
        collection: {part: {"encoder": encoder, "decoder": decoder}[part][collection] for part in variables[collection]}
        for collection in variables
    }


def save_torch(variables: Any, path: str | Path) -> None:
    """Writes an encoder as a `.safetensors` file that loads strictly into torchvision's ResNet with `fc = Identity()`.

    `load_encoder` reads the same values back, to the bit.

    Args:
      variables: `{"params": ..., "batch_stats": ...}` of a ResNet encoder, float32.
      path: the file; what is there is replaced, at once and whole.

    Raises:
      ValueError: these are not an encoder's variables, or the path does not end in `.safetensors`.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: the name must end in .safetensors")
    tensors = to_torch(variables)
    if all(any(_faults(tensors, name).values()) for name in VARIANTS):
        raise ValueError(f"{path}: nothing written, these are the variables of none of {', '.join(VARIANTS)}")
    for name in [name for name in tensors if name.endswith("running_mean")]:
        # torch would count its batches here from 0; it needs the tensor, and with a momentum never reads it.
        tensors[name.replace("running_mean", "num_batches_tracked")] = np.zeros((), np.int64)
    part = path.with_name(path.name + ".part")
    safetensors.numpy.save_file(tensors, part, metadata={"format": "pt"})
    os.replace(part, path)


def convert_resnet(tensors: dict[str, np.ndarray], name: str) -> dict[str, Any]:
    """Turns torchvision's tensors of a ResNet into Flax variables.

    Args:
      tensors: torchvision's names -> arrays of a floating type; `fc.weight`, `fc.bias` and `*.num_batches_tracked` are
        not needed. Emptied meanwhile, so that no more than one tensor is in memory twice.
      name: the encoder, a key of `jaxseg.resnet.VARIANTS`.

    Returns:
      `{"params": ..., "batch_stats": ...}` of `jaxseg.resnet.ResNet(name)`, every leaf a float32 NumPy array.

    Raises:
      ValueError: a tensor is missing, unexpected, of another shape or not of a floating type; one line names them and
        the encoder that would fit.
    """
    _check_name(name)
    _check_fit(tensors, name)
    flat = {}
    for path in encoder_shapes(name):
        array = tensors.pop(_torch_name(path))
        flat[path] = np.array(array.transpose(2, 3, 1, 0) if array.ndim == 4 else array, np.float32, order="C")
    return traverse_util.unflatten_dict(flat)


def to_torch(variables: Any) -> dict[str, np.ndarray]:
    """Turns an encoder's Flax variables, or a tree like them, into torchvision's: name -> array, dtypes kept."""
    tensors = {}
    for path, leaf in traverse_util.flatten_dict(variables).items():
        array = np.asarray(leaf)
        name = _torch_name(path) if path[-1] in _LEAVES else ".".join(path)
        tensors[name] = np.ascontiguousarray(array.transpose(3, 2, 0, 1)) if array.ndim == 4 else array
    return tensors


def encoder_shapes(name: str) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Lists the leaves of a ResNet's variables: (params, layer2_0, bn1, scale) -> (128,).

    The same as `jax.eval_shape` of the network's `init`, which takes longer than loading.
    """
    block, stage_sizes = VARIANTS[name]
    shapes: dict[tuple[str, ...], tuple[int, ...]] = {}

    def conv_and_norm(parents: tuple[str, ...], conv: str, norm: str, kernel: tuple[int, ...]) -> None:
        shapes["params", *parents, conv, "kernel"] = kernel
        for collection, leaf in (
            ("params", "scale"),
            ("params", "bias"),
            ("batch_stats", "mean"),
            ("batch_stats", "var"),
        ):
            shapes[collection, *parents, norm, leaf] = kernel[-1:]

    conv_and_norm((), "conv1", "bn1", (7, 7, 3, 64))
    inputs = 64
    for group, blocks in enumerate(stage_sizes):
        width, outputs = 64 * 2**group, 64 * 2**group * block.expansion
        for index in range(blocks):
            kernels = [(3, 3, inputs, width), (3, 3, width, width)]
            if block is Bottleneck:
                kernels = [(1, 1, inputs, width), (3, 3, width, width), (1, 1, width, outputs)]
            parents = (f"layer{group + 1}_{index}",)
            for number, kernel in enumerate(kernels, start=1):
                conv_and_norm(parents, f"conv{number}", f"bn{number}", kernel)
            if inputs != outputs:
                conv_and_norm(parents, "downsample_conv", "downsample_bn", (1, 1, inputs, outputs))
            inputs = outputs
    return shapes


def _read(path: Path) -> dict[str, np.ndarray]:
    """Reads what `load_encoder` takes: torchvision's names, without prefix -> arrays; raises as it says."""
    if path.is_dir():
        return to_torch(_part(checkpoint.read_best(path), "encoder"))
    return _strip_prefix(_read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path))


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Reads a safetensors file; raises ValueError as `load_encoder` says."""
    tensors = {}
    try:
        path.open("rb").close()  # The package's own errors do not say why a file cannot be opened.
        with safetensors.safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118
                dtype = file.get_slice(name).get_dtype()
                if dtype not in _SAFETENSORS_TYPES:
                    raise ValueError(f"{path}: its tensor {name!r} is {dtype}: save it as float32")
                tensors[name] = file.get_tensor(name)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; give the path of a readable .safetensors file") from None
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: it is truncated, damaged or no safetensors file ({error!s:.80})") from None
    return tensors


def _strip_prefix(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Removes the one prefix that a ResNet's tensors have; what is beside an encoder or a backbone is left out."""
    prefixes = {match[1] for match in map(_PREFIXED.fullmatch, tensors) if match}
    # Of two networks in a file none is taken: both stay, unexpected.
    prefix = prefixes.pop() if len(prefixes) == 1 else ""
    stripped = {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}
    if prefix.endswith(("encoder.", "backbone.")):
        return stripped
    return stripped | {name: array for name, array in tensors.items() if not name.startswith(prefix)}


def _check_name(name: str) -> None:
    if name not in VARIANTS:
        raise ValueError(f"unknown encoder {name!r}: use {', '.join(VARIANTS)}")


def _check_fit(tensors: Mapping[str, np.ndarray], name: str) -> None:
    """Raises ValueError as `convert_resnet` says."""
    faults = _faults(tensors, name)
    if not any(faults.values()):
        return
    counts = {other: sum(map(len, _faults(tensors, other).values())) for other in VARIANTS}
    # Itself, where nothing is nearer.
    nearest = min(VARIANTS, key=lambda other: (counts[other], other != name))
    remedy = f"these look like {nearest}'s: use --encoder {nearest}"
    if nearest == name:
        remedy = f"give torchvision's or timm's weights of a {name}"
    elif counts[nearest]:
        remedy = f"the nearest encoder is {nearest}, of whose tensors {counts[nearest]} do not fit"
    lists = "; ".join(_some(title, items) for title, items in faults.items() if items)
    raise ValueError(f"the tensors are not {name}'s ({lists}); {remedy}")


def _faults(tensors: Mapping[str, np.ndarray], name: str) -> dict[str, list[str]]:
    """Lists what does not fit, each tensor with its shape."""
    wanted = {_torch_name(path): _torch_shape(shape) for path, shape in encoder_shapes(name).items()}
    both = [(other, tensors[other], shape) for other, shape in wanted.items() if other in tensors]
    return {
        "missing": [f"{other} {shape}" for other, shape in wanted.items() if other not in tensors],
        "unexpected": [
            f"{other!r} {tuple(array.shape)}"
            for other, array in tensors.items()
            if other not in wanted and not _NOT_NEEDED.fullmatch(other)
        ],
        "misshaped": [
            f"{other} is {tuple(array.shape)} and should be {shape}"
            for other, array, shape in both
            if array.shape != shape
        ],
        "not floating": [
            f"{other} is {array.dtype}" for other, array, _ in both if not jnp.issubdtype(array.dtype, jnp.floating)
        ],
    }


def _check_decoder(saved: Any, wanted: Any) -> Any:
    """Returns a saved decoder whose names and shapes are the wanted ones, as float32; otherwise raises ValueError."""
    flat = traverse_util.flatten_dict(saved)
    ours = {path: tuple(leaf.shape) for path, leaf in traverse_util.flatten_dict(wanted).items()}
    theirs = {path: leaf.shape for path, leaf in flat.items()}
    faults = [
        f"{'.'.join(path)} is {theirs.get(path, 'missing')} and should be {ours.get(path, 'absent')}"
        for path in dict.fromkeys([*ours, *theirs])
        if ours.get(path) != theirs.get(path)
    ]
    if faults:
        remedy = "take the encoder alone (--weights-scope encoder), or data of as many classes"
        raise ValueError(f"the decoder does not fit ({_some('misshaped', faults)}); {remedy}")
    return traverse_util.unflatten_dict({path: np.asarray(leaf, np.float32) for path, leaf in flat.items()})


def _part(variables: Any, part: str) -> dict[str, Any]:
    """The variables of a segmenter's encoder or decoder."""
    return {collection: parts[part] for collection, parts in variables.items() if part in parts}


def _named(path: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function; a ValueError gets the file's name."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _torch_name(path: tuple[str, ...]) -> str:
    """Renames a leaf: (params, layer2_0, downsample_bn, scale) -> layer2.0.downsample.1.weight."""
    module = ".".join(path[1:-1])
    module = re.sub(r"^layer(\d+)_(\d+)\b", r"layer\1.\2", module)
    module = module.replace("downsample_conv", "downsample.0").replace("downsample_bn", "downsample.1")
    return f"{module}.{_LEAVES[path[-1]]}"


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Turns the shape of a kernel from HWIO into PyTorch's OIHW; other shapes are the same in both."""
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else tuple(shape)


def _some(title: str, items: list[str]) -> str:
    """Counts items and shows the first few on one line: missing 5: a, b, c, d, ..."""
    shown = ", ".join(item[:_LONGEST] for item in items[:_SHOWN]) + (", ..." if len(items) > _SHOWN else "")
    return f"{title} {len(items)}: {shown}"
