"""The figure that sets two models' classes side by side."""

import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.patches import Rectangle

from jaxseg.plots.page import (
    BLUE,
    FAINT,
    MUTED,
    PAGE_WIDTH,
    SMALL_SIZE,
    TEXT_SIZE,
    TITLE_SIZE,
    VERMILION,
    fit,
    new_page,
    save,
    shorten,
    text_width,
    write,
)

_ROW, _BAR = 0.36, 0.11  # inches


def plot_class_bars(
    ious: tuple[np.ndarray, np.ndarray],
    means: tuple[float, float],
    names: Sequence[str],
    models: tuple[str, str],
    title: str,
    path: pathlib.Path,
) -> None:
    """Draws two bars for each class, its IoU by each of two models, and how much more the second one has.

    Args:
      ious: (C,) float in [0, 1] of each model, NaN for a class that is neither in the labels nor in its predictions.
      means: the models' mean IoU, for a last row.
      names: the C class names, in label order.
      models: the models' names.
      title: above the figure.
      path: the PNG file to write.
    """
    margin, top = 0.12, 0.68
    names = [shorten(name) for name in names]
    left = margin + max(text_width(name, TEXT_SIZE) for name in [*names, "mean IoU"]) + 0.12
    right = PAGE_WIDTH - margin - text_width("+0.0000", TEXT_SIZE, "bold") - 0.15
    number = text_width("0.000", SMALL_SIZE) + 0.06
    length = right - left - number
    page = new_page(PAGE_WIDTH, top + _ROW * (len(names) + 1) + 0.2)
    write(
        page, margin, 0.12, fit(title, PAGE_WIDTH - 2 * margin, TITLE_SIZE, "bold"), TITLE_SIZE, weight="bold", va="top"
    )
    place = left
    for model, colour in zip(models, (BLUE, VERMILION), strict=True):
        text = fit(model, (right - left) / 2 - 0.35, TEXT_SIZE)
        page.add_patch(Rectangle((place, top - 0.24), 0.13, 0.13, color=colour, linewidth=0))
        write(page, place + 0.18, top - 0.175, text, TEXT_SIZE, va="center_baseline")
        place += 0.18 + text_width(text, TEXT_SIZE) + 0.25
    write(
        page, PAGE_WIDTH - margin, top - 0.175, "difference", SMALL_SIZE, color=MUTED, ha="right", va="center_baseline"
    )
    rows = [*zip(names, *ious, strict=True), ("mean IoU", *means)]
    for index, (name, *values) in enumerate(rows):
        y, style = top + _ROW * index, {"weight": "bold"} if index == len(names) else {}
        page.plot([margin, PAGE_WIDTH - margin], [y, y], color=FAINT, linewidth=0.6, zorder=0)
        write(page, margin, y + _ROW / 2, name, TEXT_SIZE, va="center_baseline", **style)
        for bar, (value, colour) in enumerate(zip(values, (BLUE, VERMILION), strict=True)):
            above = y + _ROW / 2 + (bar - 1) * (_BAR + 0.01)
            middle = above + _BAR / 2
            if np.isnan(value):
                write(page, left, middle, "absent", SMALL_SIZE, color=MUTED, va="center_baseline", style="italic")
                continue
            page.add_patch(Rectangle((left, above), length * value, _BAR, color=colour, linewidth=0))
            write(page, left + length * value + 0.06, middle, f"{value:.3f}", SMALL_SIZE - 1, va="center_baseline")
        difference = values[1] - values[0]
        text = "" if np.isnan(difference) else f"{difference:+z.4f}"
        write(page, PAGE_WIDTH - margin, y + _ROW / 2, text, TEXT_SIZE, ha="right", va="center_baseline", **style)
    save(page.figure, path)
