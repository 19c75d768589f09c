"""The figures of image filtering: a row of pictures, and an enlarged detail of each below it."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib.axes
import matplotlib.cbook
import numpy as np
from matplotlib.patches import Rectangle

from jaxseg.plots.page import (
    MAX_ROW_HEIGHT,
    MUTED,
    PAGE_WIDTH,
    SMALL_SIZE,
    TEXT_SIZE,
    VERMILION,
    new_page,
    save,
    write,
)

DETAIL = (48, 64)  # the height and width in pixels of what is shown enlarged


class Panel(NamedTuple):
    """One picture of a row.

    Attributes:
      title: above it.
      note: below the title, small.
      picture: (H, W) grey or (H, W, 3) RGB uint8.
    """

    title: str
    note: str
    picture: np.ndarray


def sample_photograph() -> pathlib.Path:
    """The photograph that matplotlib ships, which need not be installed: a portrait of Grace Hopper, public domain."""
    return pathlib.Path(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))


def signed_picture(values: np.ndarray, limit: float) -> np.ndarray:
    """Shows values from -limit (black) over 0 (middle grey) to limit (white), beyond them no further.

    Args:
      values: (H, W) float.
      limit: above 0.

    Returns:
      (H, W) uint8, rounded.
    """
    return np.rint(127.5 + 127.5 * np.clip(np.asarray(values, np.float64) / limit, -1, 1)).astype(np.uint8)


def magnitude_picture(values: np.ndarray, limit: float) -> np.ndarray:
    """Shows values from 0 (white) to limit (black) and beyond (black): ink for edges, as a drawing; as above."""
    return np.rint(255 - 255 * np.clip(np.asarray(values, np.float64) / limit, 0, 1)).astype(np.uint8)


def choose_detail(magnitude: np.ndarray) -> tuple[int, int]:
    """Chooses what is shown enlarged: the window of `DETAIL` pixels with the largest sum.

    Args:
      magnitude: (H, W) float, not negative.

    Returns:
      (top, left) of the window; of equals the first in row-major order; (0, 0) along a side that is too short.
    """
    height, width = (min(a, b) for a, b in zip(DETAIL, magnitude.shape, strict=True))
    sums = np.pad(np.asarray(magnitude, np.float64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    windows = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    # Rounded, because sums of equal numbers in another order are not quite equal.
    top, left = np.unravel_index(np.round(windows, 3).argmax(), windows.shape)
    return int(top), int(left)


def plot_filtered(panels: Sequence[Panel], detail: tuple[int, int], path: pathlib.Path) -> None:
    """Draws pictures of one size side by side, and below each an enlarged detail whose place is boxed.

    Args:
      panels: the pictures, one to five.
      detail: (top, left) of the window of `DETAIL` pixels that is enlarged.
      path: the PNG file to write.

    Raises:
      ValueError: the pictures differ in size.
    """
    height, width = panels[0].picture.shape[:2]
    for panel in panels:
        if panel.picture.shape[:2] != (height, width):
            raise ValueError(f"pictures of {(height, width)} and {panel.picture.shape[:2]} pixels in one figure")
    margin, gap, heading = 0.12, 0.08, 0.42
    column = (PAGE_WIDTH - 2 * margin - gap * (len(panels) - 1)) / len(panels)
    scale = min(column / width, MAX_ROW_HEIGHT / height)
    top, left = detail
    box = (top, left, min(DETAIL[0], height - top), min(DETAIL[1], width - left))
    detail_scale = column / DETAIL[1]
    detail_top = heading + scale * height + gap
    page = new_page(PAGE_WIDTH, detail_top + detail_scale * box[2] + margin)
    for index, panel in enumerate(panels):
        x = margin + index * (column + gap)
        write(page, x, 0.08, panel.title, TEXT_SIZE, weight="bold", va="top")
        write(page, x, 0.24, panel.note, SMALL_SIZE, color=MUTED, va="top")
        _draw(page, panel.picture, x + (column - scale * width) / 2, heading, scale, "hanning")
        corner = (x + (column - scale * width) / 2 + scale * box[1], heading + scale * box[0])
        frame = Rectangle(corner, scale * box[3], scale * box[2], fill=False, edgecolor=VERMILION, linewidth=0.8)
        page.add_patch(frame)
        # Every pixel of the detail as a square of its own: they are what a kernel acts on.
        crop = panel.picture[box[0] : box[0] + box[2], box[1] : box[1] + box[3]]
        _draw(page, crop, x + (column - detail_scale * box[3]) / 2, detail_top, detail_scale, "nearest")
    save(page.figure, path)


def _draw(
    page: matplotlib.axes.Axes, picture: np.ndarray, left: float, top: float, scale: float, interpolation: str
) -> None:
    """Draws a picture at `scale` inches for each pixel."""
    bottom, right = top + scale * picture.shape[0], left + scale * picture.shape[1]
    style: dict[str, Any] = {"aspect": "auto", "interpolation": interpolation, "cmap": "gray", "vmin": 0, "vmax": 255}
    page.imshow(picture, extent=(left, right, bottom, top), **style)
