"""Batches for training and evaluation from a random-access source, read in threads by Grain.

A source has `len(source)`, `source[i] -> {"image": (H, W, 3) uint8, "label": (H, W) uint8, ...}` and, for evaluation,
`source.label_sizes() -> (N, 2) int`, the height and width of every label. Images stay uint8: a quarter of the bytes to
keep ahead and to send to the device, which normalises them.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from PIL import Image

from jaxseg.data.canvases import MEAN_COLOUR, choose_canvases, plan_batches
from jaxseg.data.labels import IGNORE_LABEL


class Source(Protocol):
    """A random-access data set; `source[i]` is called from several threads at once."""

    def __len__(self) -> int:
        """The number of examples."""
        ...

    def __getitem__(self, index: int) -> dict:
        """One example: {"image": (H, W, 3) uint8, "label": (H, W) uint8}."""
        ...

    def label(self, index: int) -> np.ndarray:
        """The label of one example alone, (H, W) uint8."""
        ...

    def label_sizes(self) -> np.ndarray:
        """(N, 2) int: the height and width of every label, in pixels."""
        ...


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes an image, bilinearly; when shrinking, each pixel averages all that fall under it (antialiasing).

    Args:
      image: (H, W, 3) uint8.
      size: (height, width) in pixels.

    Returns:
      (height, width, 3) uint8; `image` itself when it already has the size.

    Source: torch.nn.functional.interpolate(mode="bilinear", antialias=True), to one grey level.
    """
    if image.shape[:2] == tuple(size):
        return image
    height, width = size
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def resize_label(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes a label to the nearest pixel, with half-pixel centres: no new value appears.

    Args:
      label: (H, W) uint8.
      size: (height, width) in pixels.

    Returns:
      (height, width) uint8; `label` itself when it already has the size.

    Source: torch.nn.functional.interpolate(mode="nearest-exact"), which rounds a few half-way cases down in float32.
    """
    if label.shape == tuple(size):
        return label
    rows, columns = map(_nearest, label.shape, size)
    return label[rows][:, columns]


def _nearest(old: int, new: int) -> np.ndarray:
    """Which of `old` pixels is nearest to each of `new` ones that take their place: (new,) int64."""
    # floor((i + 1/2) * old / new) in whole numbers: a half-way case cannot be rounded wrongly.
    return (2 * np.arange(new) + 1) * old // (2 * new)


def scale_and_crop(
    image: np.ndarray, label: np.ndarray, size: tuple[int, int], scale: float, place: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Resizes an image and its label by a factor, as `resize_image` and `resize_label` do, and cuts a window out.

    Args:
      image: (H, W, 3) uint8; of other sides than the label's it is resized to the same.
      label: (H, W) uint8.
      size: (height, width) of the window in pixels.
      scale: the factor, of the label's sides.
      place: where the window lies, down and along, from 0 (it begins where the image does) to 1 (both end together).
        Along a side that is shorter than the window it is where the image lies in the window, likewise.

    Returns:
      The image, (height, width, 3) uint8, and the label, (height, width) uint8. Beyond the image they have the mean
      colour, and the label that is ignored.
    """
    starts, lengths, edges, nearest = [], [], [], []
    for old, pixels, new, share in zip(label.shape, image.shape[:2], size, place, strict=True):
        scaled = max(round(scale * old), 1)
        start = round(share * (scaled - new))
        first, last = max(start, 0), min(start + new, scaled)
        starts.append(max(-start, 0))
        lengths.append(last - first)
        edges.append((first * pixels / scaled, last * pixels / scaled))
        nearest.append(_nearest(old, scaled)[first:last])
    # Only what is in the window is computed. At its edges Pillow averages what is beyond them, too.
    (top, bottom), (left, right) = edges
    box = (left, top, right, bottom)
    part = Image.fromarray(image).resize((lengths[1], lengths[0]), Image.Resampling.BILINEAR, box)
    rows, columns = nearest
    return (
        _on_canvas(np.asarray(part), size, starts, MEAN_COLOUR),
        _on_canvas(label[rows][:, columns], size, starts, IGNORE_LABEL),
    )


def _on_canvas(x: np.ndarray, size: Sequence[int], start: Sequence[int], value: Any) -> np.ndarray:
    """Puts x, (H, W, ...), at a place of a canvas that has `value` elsewhere."""
    canvas = np.full((*size, *x.shape[2:]), value, x.dtype)
    canvas[start[0] : start[0] + x.shape[0], start[1] : start[1] + x.shape[1]] = x
    return canvas


def steps_per_epoch(source: Source, batch_size: int) -> int:
    """The number of whole batches in one pass over `source`; the images left over wait for another epoch's shuffle.

    Raises:
      ValueError: `source` holds less than one batch.
    """
    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}: must be at least 1")
    if len(source) < batch_size:
        raise ValueError(
            f"the training split has {len(source)} images, less than one batch of {batch_size}:"
            f" give --batch-size {len(source)} or smaller"
        )
    return len(source) // batch_size


def train_batches(
    source: Source,
    *,
    image_size: tuple[int, int],
    batch_size: int,
    seed: int,
    start: int = 0,
    part: tuple[int, int] = (0, 1),
    features: np.ndarray | None = None,
    scale_range: tuple[float, float] | None = None,
    num_threads: int = 4,
) -> grain.IterDataset:
    """Endless training batches, shuffled anew in each epoch: a function of the seed, not of the threads.

    Args:
      source: the training split.
      image_size: (height, width) in pixels that images and labels are resized to.
      batch_size: images per batch; those left over at an epoch's end are dropped.
      seed: 0 to 2**32 - 1.
      start: how many batches to leave out at the beginning, without reading them: those that were trained on already.
      part: (k, P) to read only the k-th (from 0) of P equal parts of each batch: that of one of P processes.
      features: (len(source), ...), one entry for each image: they take the images' place, which are not read then.
      scale_range: instead of being resized to `image_size`, each image is resized by a factor drawn between these two,
        and a window of `image_size` is cut out of it at random; see `scale_and_crop`. Not with features.
      num_threads: batches that are prepared at the same time.

    Returns:
      A data set whose iterator gives {"image": (N, H, W, 3) uint8 (or "features": (N, ...)), "label": (N, H, W) uint8,
      "index": (N,) int32, the items' places in `source`}, with N = batch_size / P.

    Raises:
      ValueError: `source` holds less than one batch, the seed is out of range, or P does not divide the batch.
    """
    steps_per_epoch(source, batch_size)
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed {seed}: must be between 0 and {2**32 - 1}")

    def example(position_and_index: tuple[int, int]) -> dict:
        position, index = position_and_index
        if features is not None:
            label = resize_label(source.label(index), image_size)
            return {"features": features[index], "label": label, "index": np.int32(index)}
        item = source[index]
        image, label = item["image"], item["label"]
        if scale_range is None:
            image, label = resize_image(image, image_size), resize_label(label, image_size)
        else:
            # Of its own for each place in the order of all epochs: whoever reads it draws the same.
            rng = np.random.default_rng((seed, position))
            scale, *place = rng.uniform(*scale_range), *rng.random(2)
            image, label = scale_and_crop(image, label, image_size, scale, place)
        return {"image": image, "label": label, "index": np.int32(index)}

    # The seed goes before the shuffle, which needs it, and the batches before the repeat, or they straddle two epochs.
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle()
    order = order.map_with_index(lambda position, index: (int(position), int(index)))
    batches = order.batch(batch_size, drop_remainder=True, batch_fn=_reader(example, batch_size, part))
    return _read_ahead(batches.repeat(None)[start:], num_threads)


def eval_batches(
    source: Source,
    *,
    image_size: tuple[int, int] | None,
    batch_size: int,
    part: tuple[int, int] = (0, 1),
    num_threads: int = 4,
) -> grain.IterDataset:
    """One pass over every image, with each label at its own size.

    Few shapes, so that the step compiles few times: labels lie in the top left corner of a canvas, and the last batch
    of a canvas is filled up with copies of its last image that do not count. With an `image_size` there is one canvas,
    as high and as wide as the largest label, and the images come in order. Without one an image is as large as its
    label (and is resized where it is not), and lies in the corner as that does, on one of the canvases that
    `jaxseg.data.canvases` chooses.

    Args:
      source: the split.
      image_size: (height, width) in pixels that images, not labels, are resized to, or None.
      batch_size: images per batch.
      part: as in `train_batches`; all parts have the same number of batches, of the same shapes.
      num_threads: batches that are prepared at the same time.

    Returns:
      A data set that can be iterated over again and again, giving {"image": (N, H, W, 3) uint8, "label": (N, Hc, Wc)
      uint8, ignored (255) outside of the label, "label_size": (N, 2) int32, the label's own (height, width), "valid":
      (N,) bool, False for a copy, whose label is all ignored, "index": (N,) int32, the items' places in `source`}, with
      N = batch_size / P; without `image_size` H = Hc and W = Wc.

    Raises:
      ValueError: `source` is empty, `batch_size` is less than 1, or P does not divide it.
    """
    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}: must be at least 1")
    if len(source) == 0:
        raise ValueError("the split to evaluate on is empty: it needs at least one image")
    sizes = np.asarray(source.label_sizes())
    canvases = choose_canvases(sizes) if image_size is None else np.broadcast_to(sizes.max(axis=0), sizes.shape)
    index, valid = plan_batches(canvases, batch_size)

    def example(place: int) -> dict:
        item, canvas = source[int(index[place])], canvases[index[place]]
        height, width = item["label"].shape
        shown = item["label"] if valid[place] else item["label"][:0]
        label = _on_canvas(shown, canvas, (0, 0), IGNORE_LABEL)
        image = resize_image(item["image"], image_size or (height, width))
        if image_size is None:
            image = _on_canvas(image, canvas, (0, 0), MEAN_COLOUR)
        return {
            "image": image,
            "label": label,
            "label_size": np.array([height, width], np.int32),
            "valid": valid[place],
            "index": np.int32(index[place]),
        }

    batches = grain.MapDataset.range(len(index)).batch(
        batch_size, drop_remainder=True, batch_fn=_reader(example, batch_size, part)
    )
    return _read_ahead(batches, num_threads)


def _reader(example: Callable[[Any], dict], batch_size: int, part: tuple[int, int]) -> Callable[[Sequence[Any]], dict]:
    """Makes what reads a part of a batch, given the places of the whole, so that nothing is read that is not needed."""
    which, parts = part
    if batch_size % parts:
        raise ValueError(f"--batch-size {batch_size} cannot be split over {parts} processes")
    size = batch_size // parts

    def read(places: Sequence[Any]) -> dict:
        examples = [example(place) for place in places[which * size : (which + 1) * size]]
        return {name: np.stack([one[name] for one in examples]) for name in examples[0]}

    return read


def _read_ahead(batches: grain.MapDataset, num_threads: int) -> grain.IterDataset:
    """Iterates in threads. Grain's default keeps 500 elements ahead, which here are whole batches."""
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(4, num_threads))
    return batches.to_iter_dataset(options)
