"""Pretrained encoders: torchvision's and timm's weights, or those of a run of ours, <-> Flax variables, strictly."""

import contextlib
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from jaxseg.download import fetch
from jaxseg.misfit import LEAVES, Misfit, check_fit, encoder_shapes, find_faults, to_float32, torch_name
from jaxseg.resnet import VARIANTS
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
# Longer names are cut where an error shows them.
_SHOWN = 200
_PREFIXED = re.compile(r"((?:(?:module|encoder|backbone)\.)*)(?:conv1|bn1|layer[1-4])\..*", re.DOTALL)
_SAFETENSORS_TYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}
_FORMS = "a .pth, .pt or .safetensors file, the workdir of a run, its folder of checkpoints or one checkpoint in it"


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
        the workdir of a run of ours, or its folder of checkpoints: the encoder of the best checkpoint;
        one checkpoint in that folder, such as `checkpoints/7`: its encoder.
        The names in a file may have a prefix of `module.`, `encoder.` and `backbone.`; `~` is the home folder.
      base_url: where 'imagenet' is downloaded from; ends in a slash.
      cache: where downloads are kept; `jaxseg.download.cache_folder()` if None.

    Returns:
      `{"params": ..., "batch_stats": ...}` of `jaxseg.resnet.ResNet(name)`, every leaf a float32 NumPy array.

    Raises:
      ValueError: the weights cannot be downloaded or read or do not fit; one line names the file and the remedy. Of
        tensors that do not fit a `jaxseg.misfit.Misfit`, which holds the whole list.
    """
    _check_name(name)
    path = fetch(IMAGENET_FILES[name], base_url, cache) if weights == "imagenet" else _expand(weights)
    return _named(path, convert_resnet, _read(path), name)


def load_model(name: str, path: str | Path, variables: Any) -> dict[str, Any]:
    """Loads all of a run's checkpoint, the encoder and the decoder.

    Args:
      name: the encoder, a key of `jaxseg.resnet.VARIANTS`.
      path: the run's workdir or its folder of checkpoints, for the best one, or one checkpoint in that folder.
      variables: `{"params": ..., "batch_stats": ...}` of the segmenter, for the decoder's names and shapes.

    Returns:
      Variables of the same structure, every leaf a float32 NumPy array.

    Raises:
      ValueError: there is no such checkpoint, or its encoder or decoder is another one; in one line.
    """
    path = _expand(path)
    with _readable(path):
        if not path.is_dir():
            raise ValueError(f"{path} is not the workdir of a run: of other weights only the encoder can be taken")
        saved = _read_run(path)
    encoder = _named(path, convert_resnet, to_torch(_part(saved, "encoder")), name)
    decoder = _named(path, _check_decoder, _part(saved, "decoder"), _part(variables, "decoder"))
    return {
        collection: {part: {"encoder": encoder, "decoder": decoder}[part][collection] for part in variables[collection]}
        for collection in variables
    }


def save_torch(variables: Any, path: str | Path) -> None:
    """Writes an encoder as a `.safetensors` file that loads strictly into torchvision's ResNet with `fc = Identity()`.

    `load_encoder` reads the same values back, to the bit. Of a whole segmenter the encoder's names get the prefix
    `encoder.`, and with `decoder.` come the weights of `conv_transpose1` to 5 (ConvTranspose2d), `head` (Conv2d) and
    perhaps `bn1` to 5 (BatchNorm2d).

    Args:
      variables: `{"params": ..., "batch_stats": ...}` of a ResNet encoder, or of a segmenter with one; of floating
        types; saved as float32.
      path: the file, in a folder that exists; what is there is replaced, at once and whole.

    Raises:
      ValueError: these are not an encoder's variables, float32 cannot hold one of their numbers, they are not finite,
        there is no such folder, or the path does not end in `.safetensors`.
      OSError: the file cannot be written.
    """
    path = _expand(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: the name must end in .safetensors")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}: make it first")
    tensors = to_torch(variables)
    encoder = to_torch(_part(variables, "encoder")) if "decoder" in variables.get("params", ()) else tensors
    if all(any(find_faults(encoder, name).values()) for name in VARIANTS):
        raise ValueError(f"{path}: nothing written, these are the variables of none of {', '.join(VARIANTS)}")
    _named(path, _narrow, tensors)
    for name in [name for name in tensors if name.endswith("running_mean")]:
        # torch would count its batches here from 0; it needs the tensor, and with a momentum never reads it.
        tensors[name.replace("running_mean", "num_batches_tracked")] = np.zeros((), np.int64)
    # Of a link, the file that it leads to.
    target = path.resolve()
    # A name of its own: two programs may save at the same time.
    part = target.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        part.touch()
        mode = part.stat().st_mode
        safetensors.numpy.save_file(tensors, part, metadata={"format": "pt"})
        # The package makes a file for its owner alone; this is one as any other.
        part.chmod(mode)
        os.replace(part, target)
    except (OSError, safetensors.SafetensorError) as error:
        raise OSError(f"{path} cannot be written ({getattr(error, 'strerror', None) or error})") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def convert_resnet(tensors: dict[str, np.ndarray], name: str) -> dict[str, Any]:
    """Turns torchvision's tensors of a ResNet into Flax variables.

    Args:
      tensors: torchvision's names -> arrays of a floating type; `fc.weight`, `fc.bias` and `*.num_batches_tracked` are
        not needed. Emptied meanwhile, so that no more than one tensor is in memory twice.
      name: the encoder, a key of `jaxseg.resnet.VARIANTS`.

    Returns:
      `{"params": ..., "batch_stats": ...}` of `jaxseg.resnet.ResNet(name)`, every leaf a float32 NumPy array.

    Raises:
      Misfit: a tensor is missing, unexpected, of another shape, not of a floating type or not finite as float32; a
        ValueError of one line that names them and the encoder that would fit.
    """
    _check_name(name)
    check_fit(tensors, name)
    flat, broken = {}, []
    for path in encoder_shapes(name):
        array = tensors.pop(torch_name(path))
        flat[path], fault = to_float32(array.transpose(2, 3, 1, 0) if array.ndim == 4 else array)
        broken += [f"{torch_name(path)} {fault}"] * bool(fault)
    _check_finite(broken)
    return traverse_util.unflatten_dict(flat)


def to_torch(variables: Any) -> dict[str, np.ndarray]:
    """Turns an encoder's or a segmenter's Flax variables, or a tree like them, into PyTorch's: name -> array.

    The encoder's names are torchvision's, the decoder's our own; see `save_torch`. Types are kept.
    """
    tensors = {}
    for path, leaf in traverse_util.flatten_dict(variables).items():
        array = np.asarray(leaf)
        name = torch_name(path) if path[-1] in LEAVES else ".".join(path)
        if array.ndim == 4 and path[-2].startswith("conv_transpose"):
            # Flax correlates where PyTorch scatters: the kernel is turned by 180 degrees.
            array = np.ascontiguousarray(array[::-1, ::-1].transpose(2, 3, 0, 1))
        elif array.ndim == 4:
            array = np.ascontiguousarray(array.transpose(3, 2, 0, 1))
        tensors[name] = array
    return tensors


def _read(path: Path) -> dict[str, np.ndarray]:
    """Reads what `load_encoder` takes: torchvision's names, without prefix -> arrays; raises as it says."""
    with _readable(path):
        if path.is_dir():
            return to_torch(_part(_read_run(path), "encoder"))
        if not path.exists():
            raise ValueError(f"{path}: No such file or folder; give imagenet, {_FORMS}")
    return _strip_prefix(_read_safetensors(path) if path.suffix.lower() == ".safetensors" else read_torch(path))


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Within it an OSError becomes a ValueError that names the path."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{str(path)[:_SHOWN]}: {error.strerror or error}; give {_FORMS} that can be read") from None


def _read_run(path: Path) -> Any:
    """Reads a run's best checkpoint, or the named one: {'params', 'batch_stats'}; raises ValueError."""
    # Here: without it this module is imported in a sixth less time, and files of weights do not need it.
    from jaxseg import checkpoint

    return checkpoint.read_model(path)[0]


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Reads a safetensors file; raises ValueError as `load_encoder` says."""
    tensors = {}
    try:
        path.open("rb").close()  # The package's own errors do not say why a file cannot be opened.
        with safetensors.safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118
                dtype = file.get_slice(name).get_dtype()
                if dtype not in _SAFETENSORS_TYPES:
                    raise ValueError(f"its tensor {name[:_SHOWN]!r} is {dtype}: save it as float32")
                tensors[name] = file.get_tensor(name)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; give the path of a readable .safetensors file") from None
    except safetensors.SafetensorError as error:
        reason = " ".join(str(error).split())[:_SHOWN]
        raise ValueError(f"{path}: it is truncated, damaged or no safetensors file ({reason})") from None
    except ValueError as error:  # NumPy's, too, of shapes that cannot be
        raise ValueError(f"{path}: {error}") from None
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


def _check_decoder(saved: Any, wanted: Any) -> Any:
    """Returns a saved decoder whose names and shapes are the wanted ones, as float32; otherwise raises Misfit."""
    flat = {".".join(path): leaf for path, leaf in traverse_util.flatten_dict(saved).items()}
    ours = {".".join(path): leaf.shape for path, leaf in traverse_util.flatten_dict(wanted).items()}
    faults = {
        "missing": [f"{name} {shape}" for name, shape in ours.items() if name not in flat],
        "unexpected": [f"{name} {leaf.shape}" for name, leaf in flat.items() if name not in ours],
        "misshaped": [
            f"{name} is {flat[name].shape} and should be {shape}"
            for name, shape in ours.items()
            if name in flat and flat[name].shape != shape
        ],
    }
    if any(faults.values()):
        # Baseline and improved differ in the names, numbers of classes in the shapes.
        another = faults["missing"] or faults["unexpected"]
        remedy = "the experiment that trained it" if another else "data of as many classes"
        raise Misfit(
            "the decoder does not fit", faults, f"take the encoder alone (--weights-scope encoder), or {remedy}"
        )
    converted = {name: to_float32(leaf) for name, leaf in flat.items()}
    _check_finite([f"decoder {name} {fault}" for name, (_, fault) in converted.items() if fault])
    return traverse_util.unflatten_dict({tuple(name.split(".")): array for name, (array, _) in converted.items()})


def _check_finite(broken: list[str]) -> None:
    if broken:
        remedy = "a training diverged, or they are no weights: take an earlier checkpoint"
        raise Misfit("the numbers are not finite", {"not finite": broken}, remedy)


def _narrow(tensors: dict[str, np.ndarray]) -> None:
    """Makes all tensors float32, each number unchanged; raises Misfit where that cannot be."""
    rounded, broken = [], []
    for name, array in tensors.items():
        tensors[name], fault = to_float32(array)
        broken += [f"{name} {fault}"] * bool(fault)
        if not fault and (tensors[name].astype(array.dtype) != array).any():
            rounded.append(f"{name} {array.dtype}")
    _check_finite(broken)
    if rounded:
        remedy = "nothing written; round them yourself: jax.tree.map(numpy.float32, variables)"
        raise Misfit("float32 cannot hold these numbers", {"rounded": rounded}, remedy)


def _expand(path: str | Path) -> Path:
    """Replaces ~ by the home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from None


def _part(variables: Any, part: str) -> dict[str, Any]:
    """The variables of a segmenter's encoder or decoder."""
    return {collection: parts[part] for collection, parts in variables.items() if part in parts}


def _named(path: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function; a ValueError gets the file's name."""
    try:
        return function(*arguments)
    except ValueError as error:
        error.args = (f"{path}: {error}",)
        raise
