"""Images of any size -> class maps, in batches of equal shapes, of which there are few.

Each image is shown to the network once or several times: at one or more scales, and mirrored. What it gives is enlarged
to the image's own size; of several showings the probabilities are averaged. An image too large to be computed whole is
computed in overlapping tiles (see `jaxseg.tiles`).
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxseg import tiles, train
from jaxseg.enlarge import enlarge
from jaxseg.manner import Manner, Prepared, prepare

# Class maps are computed in square blocks of at most this side, and at most so many scores.
_BLOCK, _SCORES = 512, 2**23
# An incomplete batch is computed when so many images wait for others of their shape.
_WAITING = 64

# A name of the caller's, and an image.
Named = tuple[Any, Prepared]
Shapes = tuple[tuple[int, ...], ...]


def make_classify(
    model: nn.Module, variables: Any, manner: Manner, devices: Sequence[jax.Device], batch_size: int
) -> Callable[[Iterable[Named]], Iterator[tuple[Any, np.ndarray]]]:
    """Builds what classifies many images.

    Args:
      model: the segmenter.
      variables: {'params', 'batch_stats'}.
      manner: as for `prepare`.
      devices: of this process; each batch is split over them.
      batch_size: images in a batch, rounded to a multiple of the devices; where they are larger than
        `manner.image_size`, or than 512x512, correspondingly fewer.

    Returns:
      classify((name, prepared) pairs) -> (name, (H, W) uint8 class indices) pairs, each image once, in no fixed order.
    """
    network = _Network(model, train.replicate(variables, devices), manner, tuple(devices), batch_size)
    return functools.partial(_results, network, scores=False)


@dataclasses.dataclass(frozen=True)
class _Network:
    """The arguments of `make_classify`, the variables on the devices.

    Attributes:
      compiled: for which numbers of images on each device there are programs, by their shapes.
    """

    model: nn.Module
    variables: Any
    manner: Manner
    devices: tuple[jax.Device, ...]
    batch_size: int
    compiled: dict[Shapes, set[int]] = dataclasses.field(default_factory=dict)

    def most(self, shapes: Shapes) -> int:
        """How many images of these shapes make a batch on each device."""
        area = max(height * width for height, width, _ in shapes)
        usual = math.prod(self.manner.image_size or (512, 512)) * max(self.manner.scales) ** 2
        return max(1, math.ceil(self.batch_size * min(usual / area, 1) / len(self.devices)))

    def number(self, shapes: Shapes, images: int) -> int:
        """How many images each device is to take of a batch of so many: what is left of it is filled with copies.

        Where there is a program already it serves; a new one takes a power of two, so that there are few.
        """
        needed, compiled = -(-images // len(self.devices)), self.compiled.setdefault(shapes, set())
        if not any(number >= needed for number in compiled):
            compiled.add(min(2 ** (needed - 1).bit_length(), self.most(shapes)))
        return min(number for number in compiled if number >= needed)


def _results(network: _Network, images: Iterable[Named], scores: bool) -> Iterator[tuple[Any, np.ndarray]]:
    """As `make_classify` says; with `scores` it gives (H, W, C) float32 instead of classes."""
    # What is started is read later, so that the device always has work queued.
    under_way: collections.deque = collections.deque()
    for names, batch in _equal_shapes(images, network):
        if (image := batch[0].image) is not None:
            yield names[0], _classify_tiles(network, image, batch[0].canvas)
            continue
        under_way.append((names, _start(network, batch, scores)))
        if len(under_way) > train.LAG:
            names, read = under_way.popleft()
            yield from zip(names, read(), strict=True)
    for names, read in under_way:
        yield from zip(names, read(), strict=True)


def _equal_shapes(images: Iterable[Named], network: _Network) -> Iterator[tuple[list[Any], list[Prepared]]]:
    """Sorts images into batches by the shapes shown; those at the end, or that wait too long, may not be full."""
    waiting: dict[Any, list[Named]] = {}
    for name, prepared in images:
        if prepared.image is not None:  # large enough to be a batch of its own, of tiles
            yield [name], [prepared]
            continue
        shapes = prepared.shapes
        waiting.setdefault(shapes, []).append((name, prepared))
        if len(waiting[shapes]) < network.most(shapes) * len(network.devices):
            if sum(map(len, waiting.values())) < _WAITING:
                continue
            shapes = max(waiting, key=lambda shapes: len(waiting[shapes]))
        yield _unzip(waiting.pop(shapes))
    for batch in waiting.values():
        yield _unzip(batch)


def _unzip(batch: list[Named]) -> tuple[list[Any], list[Prepared]]:
    return [name for name, _ in batch], [prepared for _, prepared in batch]


def _start(network: _Network, batch: list[Prepared], scores: bool) -> Callable[[], list[np.ndarray]]:
    """Queues the computation of a batch of equal shapes, full or not; returns what waits for the results."""
    number, devices = network.number(batch[0].shapes, len(batch)), network.devices
    full = batch + batch[-1:] * (number * len(devices) - len(batch))

    def split(arrays: Iterable[Any]) -> np.ndarray:
        stacked = np.stack(list(arrays))
        return stacked.reshape(len(devices), number, *stacked.shape[1:])

    logits_fn, logits = _make_logits_fn(network.model, devices), []
    for time in range(len(batch[0].shown)):
        shown = {"image": split(one.shown[time] for one in full)}
        if network.manner.image_size is None:
            shown["size"] = split(one.sizes[time] for one in full)
        logits.append(logits_fn(network.variables, shown))
    num_classes = logits[0].shape[-1]
    sizes = {
        "size": split(one.sizes for one in full),
        "own_size": split(np.array(one.own_size, np.int32) for one in full),
    }
    side = _block_side(batch, 1 if scores else num_classes)
    look_fn = _make_look_fn(devices, network.manner.flip, (side, side), scores)
    # Of each device the blocks of its own images, several at a time.
    places: list[list[tuple[int, int, int]]] = [[] for _ in devices]
    for index, one in enumerate(batch):
        for top, left in itertools.product(*(range(0, length, side) for length in one.own_size)):
            places[index // number].append((index % number, top, left))
    rounds = -(-max(map(len, places)) // number)
    todo = np.zeros((len(devices), rounds * number, 3), np.int32)
    for device, its in enumerate(places):
        todo[device, : len(its)] = np.reshape(its, (-1, 3))
    parts = [look_fn((), {"logits": logits, **sizes, "place": part}) for part in np.split(todo, rounds, axis=1)]

    def read() -> list[np.ndarray]:
        kind = ((num_classes,), np.float32) if scores else ((), np.uint8)
        maps = [np.empty((*one.own_size, *kind[0]), kind[1]) for one in batch]
        for index, part in enumerate(map(np.asarray, parts)):
            for device, its in enumerate(places):
                for block, (image, top, left) in zip(part[device], its[index * number :][:number], strict=False):
                    there = maps[device * number + image][top : top + side, left : left + side]
                    there[:] = block[: there.shape[0], : there.shape[1]]
        return maps

    return read


def _block_side(batch: list[Prepared], num_classes: int) -> int:
    """The side of the square blocks, of few sizes, in which the results of a batch are computed."""
    side = min(_BLOCK, 2 ** (max(max(one.own_size) for one in batch) - 1).bit_length())
    while side > 32 and side**2 * num_classes > _SCORES:
        side //= 2
    return side


def _classify_tiles(network: _Network, image: np.ndarray, canvas: Any) -> np.ndarray:
    """The class map of an image that is computed in tiles; canvas: the height and width that these are padded to."""
    manner = network.manner

    def score(places: list[tiles.Place]) -> Iterator[tuple[int, np.ndarray]]:
        crops = (image[place] for place in places)
        prepared = (prepare(crop, manner, {crop.shape[:2]: canvas}) for crop in crops)
        return _results(network, enumerate(prepared), scores=True)

    return tiles.classify_in_tiles(image.shape[:2], manner.tile, manner.tile_overlap, score)


@functools.lru_cache(maxsize=8)
def _make_logits_fn(model: nn.Module, devices: tuple[jax.Device, ...]) -> Callable:
    """Compiles (variables, {'image' and, where it is padded, 'size', as `Segmenter` has them}) -> logits.

    Once for each shape, however often it is asked for.
    """

    def logits_step(variables: Any, batch: dict[str, jax.Array]) -> jax.Array:
        logits: Any = model.apply(variables, batch["image"], size=batch.get("size"))
        return logits

    return train.pmap_step(logits_step, devices, per_image=True)


@functools.lru_cache(maxsize=64)
def _make_look_fn(devices: tuple[jax.Device, ...], flip: bool, block: tuple[int, int], scores: bool) -> Callable:
    """Compiles `_look`."""
    return train.pmap_step(functools.partial(_look, flip=flip, block=block, scores=scores), devices, per_image=True)


def _look(_: Any, batch: dict[str, Any], *, flip: bool, block: tuple[int, int], scores: bool) -> jax.Array:
    """Computes blocks of the class maps, or the scores, of images.

    Args:
      _: nothing.
      batch: 'logits', a list of (N, h, w, C) for each time that the images were shown; 'size' (N, times, 2) and
        'own_size' (N, 2), as `enlarge` has them; 'place' (M, 3): of each block the image, and its first row and column.
      flip: every second time the images were mirrored.
      block: rows and columns.
      scores: give scores, not classes.

    Returns:
      (M, *block) uint8, or (M, *block, C) float32.
    """

    def look(place: jax.Array) -> jax.Array:
        image, first = place[0], place[1:]
        own_size = batch["own_size"][image]
        found = [
            enlarge(logits[image], batch["size"][image, time], own_size, first, block, mirrored=flip and time % 2 == 1)
            for time, logits in enumerate(batch["logits"])
        ]
        # Alone, the logits tell the same as their probabilities.
        score = found[0] if len(found) == 1 else functools.reduce(jnp.add, map(jax.nn.softmax, found)) / len(found)
        return score if scores else score.argmax(-1).astype(jnp.uint8)

    return jax.lax.map(look, batch["place"])
