"""The contact sheet: many small pictures, each beside its label."""

import pathlib
from collections.abc import Sequence

import matplotlib.axes
import numpy as np
from numpy.typing import ArrayLike

from jaxseg.plots.page import (
    DPI,
    MUTED,
    PAGE_WIDTH,
    SMALL_SIZE,
    TITLE_SIZE,
    fit,
    new_page,
    save,
    write,
)
from jaxseg.plots.pictures import Row, draw_legend, scaled_pictures, set_legend

_PAIRS, _MARGIN, _GAP = 3, 0.12, 0.14  # in a line of the page; inches
_LARGEST = 1.3  # inches; a portrait photograph is made narrower rather than higher than this


def plot_contact_sheet(
    rows: Sequence[Row], names: Sequence[str], colours: ArrayLike, title: str, path: pathlib.Path
) -> None:
    """Draws photographs and their labels, three pairs beside each other, captioned, with one legend.

    Args:
      rows: at least one, each of one class map; images of any, also different, sizes.
      names: the C class names, in label order.
      colours: (C, 3) uint8 RGB.
      title: above the sheet.
      path: the PNG file to write.

    Raises:
      ValueError: there are no rows, or a label has not its image's size.
    """
    if not rows:
        raise ValueError("a contact sheet needs at least one picture")
    colours = np.asarray(colours)
    column = (PAGE_WIDTH - 2 * _MARGIN - (_PAIRS - 1) * _GAP) / _PAIRS
    entries, legend_lines = set_legend(rows, names, colours, PAGE_WIDTH - 2 * _MARGIN)
    lines = [rows[start : start + _PAIRS] for start in range(0, len(rows), _PAIRS)]
    heights = [max(row.image.shape[0] * _scale(row, column) for row in line) for line in lines]
    page = new_page(PAGE_WIDTH, 0.42 + sum(heights) + 0.3 * len(lines) + 0.2 * legend_lines + 0.06)
    title = fit(title, PAGE_WIDTH - 2 * _MARGIN, TITLE_SIZE, "bold")
    write(page, _MARGIN, 0.12, title, TITLE_SIZE, weight="bold", va="top")
    top = 0.42
    for line, height in zip(lines, heights, strict=True):
        for place, row in enumerate(line):
            _draw_pair(page, row, colours, _MARGIN + place * (column + _GAP), top, column)
        top += height + 0.3
    draw_legend(page, entries, _MARGIN, top - 0.02)
    save(page.figure, path)


def _draw_pair(
    page: matplotlib.axes.Axes, row: Row, colours: np.ndarray, left: float, top: float, column: float
) -> None:
    """Draws a photograph, its label beside it, and their caption."""
    scale = _scale(row, column)
    high, wide = (length * scale for length in row.image.shape[:2])
    for number, picture in enumerate(scaled_pictures(row, ("label",), colours, scale * DPI)):
        start = left + number * (wide + 0.03)
        page.imshow(picture, extent=(start, start + wide, top + high, top), aspect="auto", interpolation="hanning")
    write(page, left, top + high + 0.04, fit(row.caption, column, SMALL_SIZE), SMALL_SIZE, va="top", color=MUTED)


def _scale(row: Row, column: float) -> float:
    """Inches for each pixel, so that a pair fills its column, or is as high as one may be."""
    height, width = row.image.shape[:2]
    return min((column - 0.03) / 2 / width, _LARGEST / height)
