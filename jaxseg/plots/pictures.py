"""Photographs with class maps laid over them."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib.axes
import numpy as np
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike
from PIL import Image

from jaxseg.plots.page import (
    DPI,
    LUMA,
    MAX_ROW_HEIGHT,
    MUTED,
    PAGE_WIDTH,
    SMALL_SIZE,
    TEXT_SIZE,
    fit,
    new_page,
    save,
    shorten,
    text_width,
    wrap,
    write,
)

VOID_COLOUR = (236, 236, 236)  # pixels that no class claims; lighter than any class colour should be
CONTOUR = 0.4  # the brightness of a contour, as a share of the region's
ROWS_PER_PAGE = 4


class Example(NamedTuple):
    """One image with what was predicted for it.

    Attributes:
      image: (H, W, 3) uint8.
      label: (H, W) integer; anything outside [0, C) is void.
      prediction: (H, W) integer from 0 up; C and above is void.
      name: for the caption, such as the file's stem; may be empty.
      mean_iou: of this image alone, for the caption; may be left out.
    """

    image: np.ndarray
    label: np.ndarray
    prediction: np.ndarray
    name: str = ""
    mean_iou: float | None = None


class Row(NamedTuple):
    """A photograph and class maps of its size beside each other.

    Attributes:
      image: (H, W, 3) uint8.
      maps: (H, W) integer each; anything outside [0, C) is void.
      caption: below it.
    """

    image: np.ndarray
    maps: tuple[np.ndarray, ...]
    caption: str


def plot_results(
    examples: Sequence[Example], names: Sequence[str], colours: ArrayLike, path: pathlib.Path
) -> list[pathlib.Path]:
    """Draws result pictures: a row per example of photograph, label and prediction, captioned, with one legend.

    Args:
      examples: images of any, also different, sizes.
      names: the C class names, in label order.
      colours: (C, 3) uint8 RGB.
      path: `figures/results.png` gives figures/results_1.png, figures/results_2.png, ... of at most four rows each.

    Returns:
      The files written.

    Raises:
      ValueError: a label or a prediction has not its image's size.
    """
    rows = [Row(one.image, (one.label, one.prediction), _caption(one, names)) for one in examples]
    return plot_rows(rows, ("photograph", "label", "prediction"), names, colours, path)


def plot_rows(
    rows: Sequence[Row], headings: Sequence[str], names: Sequence[str], colours: ArrayLike, path: pathlib.Path
) -> list[pathlib.Path]:
    """Draws rows of pictures, each a photograph and its class maps; as `plot_results`, but for:

    Args:
      rows: all of equally many class maps.
      headings: of the columns, the photograph's first.
      names: the C class names, in label order.
      colours: (C, 3) uint8 RGB.
      path: the files' name, without their numbers.
    """
    if not rows:
        return []
    pages = -(-len(rows) // ROWS_PER_PAGE)
    paths = []
    # Pages of equal length: five rows become three and two, not four and one.
    for number, places in enumerate(np.array_split(np.arange(len(rows)), pages), start=1):
        paths.append(path.with_name(f"{path.stem}_{number}{path.suffix}"))
        _plot_page([rows[place] for place in places], headings, names, np.asarray(colours), paths[-1])
    return paths


def plot_overlay(
    image: np.ndarray, classes: np.ndarray, names: Sequence[str], colours: ArrayLike, path: pathlib.Path
) -> None:
    """Draws a photograph as wide as the page, with the classes laid over it, and a legend of them.

    Args:
      image: (H, W, 3) uint8.
      classes: (H, W) integer.
      names: the C class names, in label order.
      colours: (C, 3) uint8 RGB.
      path: the PNG file to write.

    Raises:
      ValueError: `classes` has not the image's size.
    """
    margin, row = 0.12, Row(image, (classes,), "")
    room, colours = PAGE_WIDTH - 2 * margin, np.asarray(colours)
    scale = min(room / image.shape[1], PAGE_WIDTH / image.shape[0])
    height, width = scale * image.shape[0], scale * image.shape[1]
    entries, lines = set_legend([row], names, colours, room)
    page = new_page(PAGE_WIDTH, height + 2 * margin + 0.2 * lines + 0.04)
    left = (PAGE_WIDTH - width) / 2
    picture = scaled_pictures(row, ["class map"], colours, scale * DPI)[-1]
    extent = (left, left + width, margin + height, margin)
    page.imshow(picture, extent=extent, aspect="auto", interpolation="hanning")
    draw_legend(page, entries, margin, margin + height + 0.1)
    save(page.figure, path)


def overlay(image: np.ndarray, label: np.ndarray, colours: np.ndarray, alpha: float = 0.7) -> np.ndarray:
    """Lays the class colours over a photograph, with a dark contour around each region.

    Only the photograph's brightness shines through, so that a hue always means a class. Void is a light grey.

    Args:
      image: (H, W, 3) uint8.
      label: (H, W) integer; anything outside [0, C) is void.
      colours: (C, 3) uint8 RGB.
      alpha: weight of the class colour, 0 (the grey photograph) to 1 (flat colour).

    Returns:
      (H, W, 3) uint8.

    Raises:
      ValueError: image and label differ in size.
    """
    if image.shape != (*label.shape, 3):
        raise ValueError(f"image of shape {image.shape} needs a label of shape {image.shape[:2]}, not {label.shape}")
    void = (label < 0) | (label >= len(colours))
    index = np.where(void, len(colours), label)
    palette = np.concatenate([np.asarray(colours, np.float64), [VOID_COLOUR]])
    brightness = image @ np.array(LUMA)
    mixed = (1 - alpha) * brightness[..., None] + alpha * palette[index]
    mixed[_contour(index)] *= CONTOUR
    return np.rint(mixed).astype(np.uint8)


def choose_examples(class_counts: np.ndarray, num_examples: int) -> list[int]:
    """Chooses images for `plot_results` such that every class that occurs at all is shown.

    Greedy: of the classes not yet shown well the one in the fewest images comes first, and of its images the one in
    which it, and the other classes not yet shown, are largest. What is left of `num_examples` goes to images that show
    much and whose mixture of classes differs from all before: the frames of a video are alike.

    Args:
      class_counts: (N, C) integer, the pixels of each class in each image, void left out.
      num_examples: how many to choose; fewer are returned if N is smaller, more if the classes need more.

    Returns:
      Different indices in [0, N), the rarest class first.
    """
    counts = np.asarray(class_counts, dtype=np.float64)
    # How large a class is in an image, relative to the image in which it is largest: 1 is its best picture.
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    visibility = share / np.where(share.any(0), share.max(0, initial=0), 1)
    rarest_first = np.lexsort((counts.sum(0), (counts > 0).sum(0)))
    chosen: list[int] = []
    while len(chosen) < len(counts):
        shown = visibility[chosen].max(0, initial=0)
        # While there is room a class should be seen well; later it is enough that it is seen.
        wanted = shown < (0.25 if len(chosen) < num_examples else np.finfo(float).tiny)
        wanted &= share.any(0)
        if wanted.any():
            rarest = rarest_first[wanted[rarest_first]][0]
            score = visibility[:, rarest] * visibility[:, wanted].sum(1)
        elif len(chosen) < num_examples:
            difference = np.abs(share[:, None] - share[chosen]).sum(-1).min(1, initial=2)
            score = difference * visibility.sum(1)
        else:
            break
        score[chosen] = -1
        chosen.append(int(score.argmax()))
    return chosen


def _plot_page(
    rows: Sequence[Row], headings: Sequence[str], names: Sequence[str], colours: np.ndarray, path: pathlib.Path
) -> None:
    """One file of `plot_rows`."""
    margin, gap, line = 0.12, 0.07, 0.14
    column = (PAGE_WIDTH - 2 * margin - (len(headings) - 1) * gap) / len(headings)
    scales = [min(column / row.image.shape[1], MAX_ROW_HEIGHT / row.image.shape[0]) for row in rows]
    captions = [wrap(row.caption, PAGE_WIDTH - 2 * margin, SMALL_SIZE) for row in rows]
    entries, legend_lines = set_legend(rows, names, colours, PAGE_WIDTH - 2 * margin)
    body = sum(scale * row.image.shape[0] + 0.18 for scale, row in zip(scales, rows, strict=True))
    page = new_page(PAGE_WIDTH, 0.32 + body + line * sum(map(len, captions)) + 0.2 * legend_lines + 0.1)
    for index, heading in enumerate(headings):
        text = fit(heading, column, TEXT_SIZE, "bold")
        write(page, margin + column / 2 + index * (column + gap), 0.24, text, TEXT_SIZE, ha="center", weight="bold")
    top = 0.32
    for row, scale, caption in zip(rows, scales, captions, strict=True):
        height, width = scale * row.image.shape[0], scale * row.image.shape[1]
        for index, picture in enumerate(scaled_pictures(row, headings[1:], colours, scale * DPI)):
            left = margin + index * (column + gap) + (column - width) / 2
            page.imshow(picture, extent=(left, left + width, top + height, top), aspect="auto", interpolation="hanning")
        top += height + 0.06
        for text in caption:
            write(page, margin, top, text, SMALL_SIZE, va="top")
            top += line
        top += 0.12
    draw_legend(page, entries, margin, top + 0.06)
    save(page.figure, path)


def scaled_pictures(row: Row, headings: Sequence[str], colours: np.ndarray, scale: float) -> list[np.ndarray]:
    """The photograph and its overlays, at one to two times the printed size, so that contours print equally thin.

    Args:
      row: the image and its class maps.
      headings: of the class maps.
      colours: (C, 3) uint8 RGB.
      scale: printed pixels for each pixel of the image.

    Returns:
      (H', W', 3) uint8 for each.
    """
    height, width = row.image.shape[:2]
    zoom = np.ceil(scale) if scale > 1 else 1 / np.floor(1 / scale)
    new_height, new_width = max(1, round(height * zoom)), max(1, round(width * zoom))
    image = np.asarray(Image.fromarray(row.image).resize((new_width, new_height), Image.Resampling.BICUBIC))
    # The nearest pixel's class: a class number has no meaning between two others.
    lines = (np.arange(new_height) * 2 + 1) * height // (2 * new_height)
    columns = (np.arange(new_width) * 2 + 1) * width // (2 * new_width)
    maps = []
    for name, classes in zip(headings, row.maps, strict=True):
        if classes.shape != (height, width):
            raise ValueError(f"image of {height}x{width} pixels needs a {name} of that size, not {classes.shape}")
        maps.append(classes[lines[:, None], columns])
    return [image, *(overlay(image, classes, colours) for classes in maps)]


def _caption(example: Example, names: Sequence[str]) -> str:
    """The image's name and IoU where there are any, and the classes predicted, the largest first."""
    counts = np.bincount(np.ravel(example.prediction), minlength=len(names))[: len(names)]
    # A name that wraps in its middle reads like two names: no-break spaces.
    found = [
        shorten(names[index]).replace(" ", "\u00a0") for index in np.argsort(-counts, kind="stable") if counts[index]
    ]
    parts = [shorten(example.name, 60)] if example.name else []
    parts += [f"mIoU {example.mean_iou:.3f}"] if example.mean_iou is not None else []
    return " · ".join([*parts, "predicted: " + ", ".join(found)])


def set_legend(
    rows: Sequence[Row], names: Sequence[str], colours: np.ndarray, width: float
) -> tuple[list[tuple[float, int, str, np.ndarray]], int]:
    """Sets the classes on the page, and void where a label has it, in lines of at most that many inches.

    Returns:
      (left in inches, line, name, colour) of each entry, and the number of lines.
    """
    used = np.unique(np.concatenate([np.unique(classes) for row in rows for classes in row.maps]))
    inside = (used >= 0) & (used < len(names))
    wanted = [(shorten(names[index]), colours[index] / 255) for index in used[inside]]
    if not inside.all():
        wanted.append(("void", np.array(VOID_COLOUR) / 255))
    entries, left, line = [], 0.0, 0
    for name, colour in wanted:
        entry_width = 0.2 + text_width(name, TEXT_SIZE) + 0.18
        if left and left + entry_width - 0.18 > width:
            left, line = 0.0, line + 1
        entries.append((left, line, name, colour))
        left += entry_width
    return entries, line + 1


def draw_legend(page: matplotlib.axes.Axes, entries: list, left: float, top: float) -> None:
    """Draws what `set_legend` has set."""
    for offset, row, name, colour in entries:
        middle = top + 0.2 * row + 0.06
        box = {"facecolor": colour, "edgecolor": MUTED, "linewidth": 0.5}
        page.add_patch(Rectangle((left + offset, middle - 0.065), 0.13, 0.13, **box))
        write(page, left + offset + 0.18, middle, name, TEXT_SIZE, va="center_baseline")


def _contour(index: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels whose right or lower neighbour belongs to another region."""
    contour = np.zeros(index.shape, bool)
    contour[:, :-1] |= index[:, :-1] != index[:, 1:]
    contour[:-1] |= index[:-1] != index[1:]
    return contour
