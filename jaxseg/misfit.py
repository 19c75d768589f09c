"""Which tensors a ResNet needs, and what to say of those that do not fit."""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxseg.resnet import VARIANTS, Bottleneck

# A classifier has them, an encoder has no use for them; older files lack the counters.
_NOT_NEEDED = re.compile(r"fc\.(weight|bias)|(.*\.)?num_batches_tracked")
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
# Where to look for a ResNet under a prefix: one of its tensors.
_FIRST = "layer1.0.conv1.weight"
# What a message shows of each kind of misfit, and of a long name.
_SHOWN, _LONGEST = 20, 160


class Misfit(ValueError):
    """Tensors that are not those of a network; the message, on one line, shows the first of each kind.

    Attributes:
      faults: all of them: kind ('missing', 'unexpected', 'misshaped', ...) -> a text for each tensor, with its shape,
        the one it should have, or both.
    """

    def __init__(self, what: str, faults: dict[str, list[str]], remedy: str):
        self.faults = {title: items for title, items in faults.items() if items}
        lists = "; ".join(_some(title, items) for title, items in self.faults.items())
        # First what a person can do: the lists are long.
        super().__init__(f"{what}; {remedy} ({lists})")


def check_fit(tensors: Mapping[str, Any], name: str) -> None:
    """Raises Misfit unless torchvision's tensors, arrays by name, are those of the ResNet `name`."""
    faults = find_faults(tensors, name)
    if any(faults.values()):
        raise Misfit(f"the tensors are not {name}'s", faults, _remedy(tensors, name))


def find_faults(tensors: Mapping[str, Any], name: str) -> dict[str, list[str]]:
    """Lists what does not fit, each tensor with its shapes."""
    wanted = _wanted(name)
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


def to_float32(array: Any) -> tuple[np.ndarray, str]:
    """Copies an array of a floating type as float32, rounded; returns it and what is wrong with its numbers, or ""."""
    with np.errstate(over="ignore", invalid="ignore"):
        copy = np.array(array, np.float32, order="C")
    if np.isfinite(copy).all():
        return copy, ""
    return copy, "beyond float32's range" if np.isfinite(array).all() else "inf or nan"


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


def torch_name(path: tuple[str, ...]) -> str:
    """Renames a leaf: (params, layer2_0, downsample_bn, scale) -> layer2.0.downsample.1.weight."""
    module = ".".join(path[1:-1])
    module = re.sub(r"\blayer(\d+)_(\d+)\b", r"layer\1.\2", module)
    module = module.replace("downsample_conv", "downsample.0").replace("downsample_bn", "downsample.1")
    return f"{module}.{LEAVES[path[-1]]}"


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Turns the shape of a kernel from HWIO into PyTorch's OIHW; other shapes are the same in both."""
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else tuple(shape)


def _wanted(name: str) -> dict[str, tuple[int, ...]]:
    """torchvision's tensors of a ResNet: name -> shape."""
    return {torch_name(path): torch_shape(shape) for path, shape in encoder_shapes(name).items()}


def _remedy(tensors: Mapping[str, Any], name: str) -> str:
    """What to do about tensors that are not `name`'s."""
    if prefixed := _below_a_prefix(tensors, name):
        prefixes, encoder = " or ".join(repr(prefix[:_LONGEST]) for prefix in prefixed), next(iter(prefixed.values()))
        option = "" if encoder == name else f" and use --encoder {encoder}"
        return f"without the prefix {prefixes} they are {encoder}'s: save them under names without it{option}"
    nearest, fitting = _nearest(tensors, name)
    faults = sum(map(len, find_faults(tensors, nearest).values()))
    if nearest == name or 2 * fitting < len(_wanted(nearest)):
        return f"give torchvision's or timm's weights of a {name}"
    if faults:
        return f"the nearest encoder is {nearest}, of whose tensors {faults} do not fit"
    return f"these look like {nearest}'s: use --encoder {nearest}"


def _nearest(tensors: Mapping[str, Any], name: str) -> tuple[str, int]:
    """The encoder of which most tensors are there in name and shape, `name` itself if none has more; and how many."""
    fitting, ranks = {}, {}
    for other in VARIANTS:
        fitting[other] = sum(key in tensors and tensors[key].shape == shape for key, shape in _wanted(other).items())
        # A smaller network's may all be among a larger one's.
        ranks[other] = fitting[other], -sum(map(len, find_faults(tensors, other).values())), other == name
    nearest = max(VARIANTS, key=ranks.__getitem__)
    return nearest, fitting[nearest]


def _below_a_prefix(tensors: Mapping[str, Any], name: str) -> dict[str, str]:
    """The prefixes below which all of an encoder's tensors are, and that encoder."""
    found = {}
    for prefix in [other.removesuffix(_FIRST) for other in tensors if other.endswith(_FIRST) and other != _FIRST][:4]:
        below = {other.removeprefix(prefix): array for other, array in tensors.items() if other.startswith(prefix)}
        nearest, fitting = _nearest(below, name)
        if fitting == len(_wanted(nearest)):
            found[prefix] = nearest
    return found


def _some(title: str, items: list[str]) -> str:
    """Counts items and shows the first on one line: missing 25: a, b, c, ... and 5 more."""
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{title} {len(items)}: " + ", ".join(item[:_LONGEST] for item in items[:_SHOWN]) + more
