"""The figure of a confusion matrix."""

import pathlib
from collections.abc import Sequence

import matplotlib.axes
import numpy as np
from matplotlib.patches import Rectangle

from jaxseg.plots.page import (
    BLUE,
    FAINT,
    INK,
    MUTED,
    SMALL_SIZE,
    TEXT_SIZE,
    TITLE_SIZE,
    new_page,
    save,
    shorten,
    text_width,
    write,
)


def plot_confusion(confusion: np.ndarray, names: Sequence[str], path: pathlib.Path, title: str = "") -> None:
    """Draws the confusion matrix, each row in percent of its label's pixels, with the IoU of each class beside it.

    Cells under half a percent are left blank. A class that no label shows has no percentages: its row is grey. A class
    that is neither in the labels nor in the predictions has no IoU and is left out of the mean: it is marked "absent".

    Args:
      confusion: (C, C) integer, label in rows, prediction in columns.
      names: the C class names, in label order.
      path: the PNG file to write.
      title: above the matrix.

    Raises:
      ValueError: the matrix is not square, or there are not C names.
    """
    confusion = np.asarray(confusion, dtype=np.int64)
    size = len(names)
    if confusion.shape != (size, size):
        raise ValueError(f"confusion has shape {confusion.shape}, but {size} names need ({size}, {size})")
    names = [shorten(name) for name in names]
    name_width = max(text_width(name, TEXT_SIZE) for name in names)
    cell = float(np.clip(5.2 / size, 0.27, 0.55))
    left, top, side = name_width + 0.42, 0.62 if title else 0.36, cell * size
    width = max(side + 1.9, text_width(title, TITLE_SIZE, "bold") + 0.15)
    page = new_page(left + width, top + side + 0.72 * name_width + 0.48)
    if title:
        write(page, left, 0.14, title, TITLE_SIZE, weight="bold", va="top")
    _draw_cells(page, confusion, left, top, cell)
    _draw_names(page, names, left, top, cell, name_width)
    _draw_iou_bars(page, confusion, left + side + 0.22, top, cell)
    save(page.figure, path)


def _draw_cells(page: matplotlib.axes.Axes, confusion: np.ndarray, left: float, top: float, cell: float) -> None:
    """The matrix: shades of blue by the root of the share, so that small confusions show, and the percentages."""
    total = confusion.sum(1, keepdims=True)
    share = confusion / np.maximum(total, 1)
    size = len(confusion)
    light, dark = np.array([1.0, 1.0, 1.0]), np.array([0.03, 0.27, 0.5])
    centred = {"ha": "center", "va": "center_baseline"}
    for row in range(size):
        if not total[row]:
            band = Rectangle((left, top + row * cell), size * cell, cell, facecolor="#EEEEEE", edgecolor="white")
            page.add_patch(band)
            note = "no pixel has this label" if size * cell > 1.4 else "no label"
            write(page, left + size * cell / 2, top + (row + 0.5) * cell, note, SMALL_SIZE, color=MUTED, **centred)
            continue
        for column in range(size):
            depth = np.sqrt(share[row, column])
            colour = light + (dark - light) * depth
            corner = (left + column * cell, top + row * cell)
            page.add_patch(Rectangle(corner, cell, cell, facecolor=colour, edgecolor=FAINT, linewidth=0.5))
            percent = f"{100 * share[row, column]:.0f}"
            if percent != "0":
                style = {"color": "white" if depth > 0.7 else INK, **centred}
                write(page, corner[0] + cell / 2, corner[1] + cell / 2, percent, min(TEXT_SIZE, 24 * cell), **style)


def _draw_names(
    page: matplotlib.axes.Axes, names: Sequence[str], left: float, top: float, cell: float, name_width: float
) -> None:
    """The class names left of the rows and slanted under the columns, and what rows and columns are."""
    side = cell * len(names)
    for index, name in enumerate(names):
        middle = (index + 0.5) * cell
        write(page, left - 0.07, top + middle, name, TEXT_SIZE, ha="right", va="center_baseline")
        slanted = {"rotation": 45, "rotation_mode": "anchor", "ha": "right", "va": "center"}
        write(page, left + middle + 0.02, top + side + 0.09, name, TEXT_SIZE, **slanted)
    centred = {"color": MUTED, "ha": "center", "va": "center"}
    write(page, left - name_width - 0.24, top + side / 2, "label", TEXT_SIZE, rotation=90, **centred)
    below = top + side + 0.72 * name_width + 0.32
    write(page, left + side / 2, below, "prediction", TEXT_SIZE, **centred)
    write(page, left, top - 0.1, "% of the label's pixels", SMALL_SIZE, color=MUTED)


def _draw_iou_bars(page: matplotlib.axes.Axes, confusion: np.ndarray, left: float, top: float, cell: float) -> None:
    """A bar per class from 0 to 1 with its IoU, and the mean over the classes that occur."""
    intersection = np.diagonal(confusion)
    union = confusion.sum(0) + confusion.sum(1) - intersection
    iou = intersection[union > 0] / union[union > 0]
    length, thickness = 1.1, min(0.6 * cell, 0.22)
    heading = f"IoU, mean {iou.mean():.3f}" if iou.size else "IoU"
    write(page, left, top - 0.1, heading, SMALL_SIZE, color=MUTED)
    for row in range(len(confusion)):
        middle = top + (row + 0.5) * cell
        if not union[row]:
            write(page, left, middle, "absent", SMALL_SIZE, color=MUTED, va="center_baseline", style="italic")
            continue
        value = intersection[row] / union[row]
        for width, colour in ((length, "#EEEEEE"), (length * value, BLUE)):
            page.add_patch(Rectangle((left, middle - thickness / 2), width, thickness, color=colour, linewidth=0))
        write(page, left + length + 0.07, middle, f"{value:.3f}", SMALL_SIZE, va="center_baseline")
