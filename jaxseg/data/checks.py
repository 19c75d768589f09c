"""Looks at every example of a data set once, in threads, for what would otherwise break a training hours into it."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from jaxseg.data.labels import IGNORE_LABEL
from jaxseg.data.threads import map_ahead


class Source(Protocol):
    """A random-access data set that can say what its examples are called; see `loader.Source`."""

    def __len__(self) -> int:
        """The number of examples."""
        ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One example: {"image": (H, W, 3) uint8, "label": (H, W) uint8}; ValueError if it cannot be read."""
        ...

    def label(self, index: int) -> np.ndarray:
        """The label of one example alone, (H, W) uint8."""
        ...

    def where(self, index: int) -> tuple[str, str]:
        """What messages call an example's image and its label."""
        ...


@dataclasses.dataclass(frozen=True)
class Look:
    """What was seen of one example.

    Attributes:
      split: the name of its split.
      index: its place there.
      mistakes: what is wrong with it, a line each.
      size: (height, width) of the image in pixels; None where it, or the label, cannot be read.
      counts: (256,) int64, the pixels of each value of the label; None where that cannot be read.
      digest: of the image's pixels; empty where it cannot be read, or was not asked for.
    """

    split: str
    index: int
    mistakes: tuple[str, ...]
    size: tuple[int, int] | None = None
    counts: np.ndarray | None = None
    digest: bytes = b""


def look_at_all(
    sources: Mapping[str, Source], num_classes: int, *, digests: bool = False, progress: bool = True
) -> Iterator[Look]:
    """Decodes every image and label once.

    Args:
      sources: the splits.
      num_classes: labels must be below it, or 255.
      digests: compute those of the images, too.
      progress: shows a progress bar on a terminal's standard error.

    Returns:
      What was seen, in the order of the splits and of the examples.
    """
    examples = [(split, index) for split, source in sources.items() for index in range(len(source))]

    def look(example: tuple[str, int]) -> Look:
        split, index = example
        return _look_at(sources[split], split, index, num_classes, digests)

    bar = tqdm(total=len(examples), desc="checking the images", unit="img", leave=False, disable=not progress or None)
    with bar:
        for seen in map_ahead(look, examples):
            bar.update()
            yield seen


def check_sources(sources: Mapping[str, Source], num_classes: int, progress: bool = True) -> dict[str, np.ndarray]:
    """Makes sure that nothing is wrong with any example.

    Args:
      sources: the splits.
      num_classes: labels must be below it, or 255.
      progress: shows a progress bar on a terminal's standard error.

    Returns:
      For each split, which values occur in its labels: (256,) bool.

    Raises:
      ValueError: names the first bad file, in the order of the splits and of the examples, and counts the others.
    """
    mistakes: list[str] = []
    values = {split: np.zeros(256, bool) for split in sources}
    for look in look_at_all(sources, num_classes, progress=progress):
        mistakes += look.mistakes
        if look.counts is not None:
            values[look.split] |= look.counts > 0
    raise_first(mistakes)
    return values


def raise_first(mistakes: Sequence[str]) -> None:
    """Raises ValueError for the first of some mistakes, if there are any, and says how many they are."""
    if mistakes:
        raise ValueError(mistakes[0] + (f" (the first of {len(mistakes)} mistakes)" if len(mistakes) > 1 else ""))


def _look_at(source: Source, split: str, index: int, num_classes: int, digest: bool) -> Look:
    try:
        item = source[index]
    except ValueError as error:
        mistakes = [str(error)]
        try:  # the label may be bad as well, or tell something all the same
            counts = _count(source.label(index))
        except ValueError as other:
            return Look(split, index, tuple(dict.fromkeys([*mistakes, str(other)])))
        return Look(split, index, (*mistakes, *_find_outside(source, index, counts, num_classes)), counts=counts)
    (height, width), (label_height, label_width) = item["image"].shape[:2], item["label"].shape
    image_name, label_name = source.where(index)
    mistakes = []
    if (height, width) != (label_height, label_width):
        mistakes.append(
            f"{label_name}: is {label_width}x{label_height} (width x height), but its image {image_name}, upright, is"
            f" {width}x{height}; make them the same size"
        )
    counts = _count(item["label"])
    mistakes += _find_outside(source, index, counts, num_classes)
    key = b""
    if digest:
        pixels = np.ascontiguousarray(item["image"]).tobytes()
        key = hashlib.blake2b(b"%dx%d" % (height, width) + pixels, digest_size=16).digest()
    return Look(split, index, tuple(mistakes), (height, width), counts, key)


def _count(label: np.ndarray) -> np.ndarray:
    return np.bincount(label.ravel(), minlength=256)


def _find_outside(source: Source, index: int, counts: np.ndarray, num_classes: int) -> list[str]:
    outside = np.flatnonzero(counts[num_classes:IGNORE_LABEL]) + num_classes
    if not outside.size:
        return []
    return [
        f"{source.where(index)[1]}: has the value {outside.max()}, outside 0..{num_classes - 1} (255 is ignored);"
        " correct the label, or give all classes in classes.txt or --num-classes"
    ]
