"""The figure of an ablation: what each variant of a model scores."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib.axes
import numpy as np

from jaxseg.plots.page import (
    BLUE,
    FAINT,
    INK,
    MUTED,
    PAGE_WIDTH,
    SMALL_SIZE,
    TEXT_SIZE,
    TITLE_SIZE,
    new_page,
    save,
    shorten,
    text_width,
    write,
)

_ROW = 0.3  # inches


class Variant(NamedTuple):
    """A variant of a model.

    Attributes:
      title: such as "+ batch norm".
      scores: for each split its mIoU, (seeds,) float, one at least; a split may be missing.
      note: stands where scores are missing, such as "diverged".
    """

    title: str
    scores: dict[str, np.ndarray]
    note: str = ""


def plot_variants(variants: Sequence[Variant], title: str, path: pathlib.Path) -> None:
    """Draws a row for each variant and a panel for each split: every seed's mIoU, their mean, and it as a number.

    A dotted line goes down from the first variant's mean. The axes begin where the scores do.

    Args:
      variants: one at least; the first is what the others are read against.
      title: above the figure.
      path: the PNG file to write.
    """
    splits = list(dict.fromkeys(split for variant in variants for split in variant.scores)) or ["validation"]
    margin, top = 0.12, 0.72
    left = margin + max(text_width(shorten(variant.title), TEXT_SIZE) for variant in variants) + 0.15
    numbers = [_number(values) for variant in variants for values in variant.scores.values()]
    number = max(text_width(text, SMALL_SIZE) for text in [*numbers, "0.0000"])
    column = (PAGE_WIDTH - left) / len(splits)
    bottom = top + _ROW * len(variants)
    page = new_page(PAGE_WIDTH, bottom + 0.42)
    write(page, margin, 0.12, title, TITLE_SIZE, weight="bold", va="top")
    for row, variant in enumerate(variants):
        write(page, margin, top + _ROW * (row + 0.5), shorten(variant.title), TEXT_SIZE, va="center_baseline")
    for index, split in enumerate(splits):
        start = left + index * column
        _draw_split(page, variants, split, (start, start + column - number - 0.3), (top, bottom))
    save(page.figure, path)


def _draw_split(
    page: matplotlib.axes.Axes,
    variants: Sequence[Variant],
    split: str,
    across: tuple[float, float],
    down: tuple[float, float],
) -> None:
    """One panel, its axis from `across[0]` to `across[1]` inches, its rows from `down[0]` to `down[1]`."""
    ticks = _choose_ticks(np.concatenate([variant.scores.get(split, np.zeros(0)) for variant in variants]))
    low, high, decimals = ticks[0], ticks[-1], len(f"{ticks[1] - ticks[0]:.3g}") - len("0.")

    def place(score: float) -> float:
        return across[0] + (score - low) / (high - low) * (across[1] - across[0])

    write(page, across[0], down[0] - 0.12, f"{split} mIoU", SMALL_SIZE, color=MUTED)
    for tick in ticks:
        page.plot([place(tick)] * 2, down, color=FAINT, linewidth=0.6, zorder=0)
        write(page, place(tick), down[1] + 0.16, f"{tick:.{decimals}f}", SMALL_SIZE, ha="center")
    first = variants[0].scores.get(split)
    if first is not None:
        line: dict[str, Any] = {"color": INK, "linewidth": 0.9, "linestyle": (0, (1, 2)), "zorder": 1}
        page.plot([place(float(np.mean(first)))] * 2, down, **line)
    for row, variant in enumerate(variants):
        middle = down[0] + _ROW * (row + 0.5)
        if split not in variant.scores:
            write(page, across[1] + 0.1, middle, variant.note, SMALL_SIZE, color=MUTED, va="center_baseline")
            continue
        values = variant.scores[split]
        dots: dict[str, Any] = {"linestyle": "none", "marker": "o", "color": BLUE, "markeredgewidth": 0}
        if len(values) > 1:
            page.plot([place(x) for x in values], [middle] * len(values), markersize=4, alpha=0.45, **dots)
        mean = place(float(np.mean(values)))
        page.plot([mean] * 2, [middle - 0.08, middle + 0.08], color=BLUE, linewidth=2, solid_capstyle="butt")
        write(page, across[1] + 0.1, middle, _number(values), SMALL_SIZE, va="center_baseline")


def _number(values: np.ndarray) -> str:
    """The mean, and of several values their deviation."""
    spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{spread}"


def _choose_ticks(values: np.ndarray) -> np.ndarray:
    """Two to five round numbers, equally far apart, around the values."""
    low, high = (values.min(), values.max()) if values.size else (0.0, 1.0)
    for step in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5):
        # Rounded, because a multiple of a tenth is not quite one.
        first, last = np.floor(round(low / step, 6)), np.ceil(round(high / step, 6))
        last = max(last, first + 1)
        if last - first <= 4:
            break
    return np.arange(first, last + 1) * step
