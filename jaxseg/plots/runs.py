"""The figures of a training run: curves, confusion matrix, result pictures."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib.axes
import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from jaxseg.plots.page import (
    BLUE,
    DPI,
    FAINT,
    INK,
    LUMA,
    MAX_ROW_HEIGHT,
    MUTED,
    PAGE_WIDTH,
    SMALL_SIZE,
    TEXT_SIZE,
    TITLE_SIZE,
    VERMILION,
    new_figure,
    new_page,
    save,
    text_width,
    write,
)

VOID_COLOUR = (236, 236, 236)  # pixels that no class claims; lighter than any class colour should be
CONTOUR = 0.4  # the brightness of a contour, as a share of the region's

ROWS_PER_PAGE = 4


class StageHistory(NamedTuple):
    """What one training stage recorded; all values finite.

    Attributes:
      name: for the title, such as "stage 1: encoder frozen".
      steps: (S,) integer, the iterations that were logged.
      losses: (S,) float, the training loss at each of them.
      epochs: (E,) integer, the epochs after which the validation set was measured.
      mean_ious: (E,) float in [0, 1], the validation mIoU after each of them.
    """

    name: str
    steps: np.ndarray
    losses: np.ndarray
    epochs: np.ndarray
    mean_ious: np.ndarray


class Example(NamedTuple):
    """One image with what was predicted for it.

    Attributes:
      image: (H, W, 3) uint8.
      label: (H, W) integer; anything outside [0, C) is void.
      prediction: (H, W) integer in [0, C).
      name: for the caption, such as the file's stem; may be empty.
      mean_iou: of this image alone, for the caption; may be left out.
    """

    image: np.ndarray
    label: np.ndarray
    prediction: np.ndarray
    name: str = ""
    mean_iou: float | None = None


def plot_training(history: Sequence[StageHistory], directory: pathlib.Path, first: int = 1) -> list[pathlib.Path]:
    """Draws a figure per stage: training loss per iteration beside validation mIoU per epoch.

    All stages share the vertical axes, so that the figures can be read side by side; the loss axis is logarithmic if
    the loss falls tenfold. From the second stage on a dotted line gives the best mIoU of the stages before.

    Args:
      history: the stages in order.
      directory: an existing folder; receives training_stage_1.png, training_stage_2.png, ...
      first: the first stage's number in the files' names.

    Returns:
      The files written.
    """
    losses = np.concatenate([np.zeros(0), *(np.asarray(stage.losses, float) for stage in history)])
    trend = np.concatenate([np.zeros(0), *(_moving_average(stage.losses) for stage in history)])
    log_scale = losses.size > 0 and losses.min() > 0 and trend.max() >= 10 * trend.min()
    loss_limits = _loss_limits(losses, log_scale)
    mean_iou_limits = _mean_iou_limits(np.concatenate([np.zeros(0), *(stage.mean_ious for stage in history)]))
    paths, best_before = [], None
    for index, stage in enumerate(history, start=first):
        figure = new_figure(PAGE_WIDTH, 2.75)
        write(figure, 0.09, 0.955, stage.name, TITLE_SIZE, weight="bold", va="top")
        _plot_loss(_panel(figure, (0.09, 0.16, 0.385, 0.63)), stage, loss_limits, log_scale)
        _plot_mean_iou(_panel(figure, (0.6, 0.16, 0.385, 0.63)), stage, mean_iou_limits, best_before)
        if len(stage.mean_ious):
            best_before = max(float(np.max(stage.mean_ious)), best_before or 0.0)
        paths.append(directory / f"training_stage_{index}.png")
        save(figure, paths[-1])
    return paths


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
    names = [_shorten(name) for name in names]
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


def plot_results(
    examples: Sequence[Example], names: Sequence[str], colours: np.ndarray, path: pathlib.Path
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
    if not examples:
        return []
    pages = -(-len(examples) // ROWS_PER_PAGE)
    paths = []
    # Pages of equal length: five examples become three and two, not four and one.
    for number, rows in enumerate(np.array_split(np.arange(len(examples)), pages), start=1):
        paths.append(path.with_name(f"{path.stem}_{number}{path.suffix}"))
        _plot_results_page([examples[row] for row in rows], names, np.asarray(colours), paths[-1])
    return paths


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


def _shorten(name: str, length: int = 28) -> str:
    """The name, or its start and an ellipsis."""
    return name if len(name) <= length else f"{name[: length - 1].rstrip()}…"


def _panel(figure: Figure, position: tuple[float, float, float, float]) -> matplotlib.axes.Axes:
    """Axes in the style of the curves: two spines, faint horizontal lines."""
    axes = figure.add_axes(position)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(which="both", labelsize=SMALL_SIZE, colors=MUTED, labelcolor=INK, length=3, width=0.6)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def _subtitle(axes: matplotlib.axes.Axes, text: str) -> None:
    """A note on top of a panel, where it can't cover a curve."""
    write(axes, 0, 1.04, text, SMALL_SIZE, color=MUTED, transform=axes.transAxes)


def _moving_average(values: np.ndarray) -> np.ndarray:
    """The centred, weighted mean over about a twentieth of the values, over fewer at both ends."""
    values = np.asarray(values, dtype=np.float64)
    window = len(values) // 40 * 2 + 1
    if window == 1:
        return values
    weights = np.hanning(window + 2)[1:-1]
    return np.convolve(values, weights, "same") / np.convolve(np.ones(len(values)), weights, "same")


def _loss_limits(losses: np.ndarray, log_scale: bool) -> tuple[float, float]:
    """A little beyond the smallest and the largest loss."""
    if not losses.size:
        return 0.0, 1.0
    low, high = losses.min(), losses.max()
    if log_scale:
        return low / 1.15, high * 1.15
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 0.1
    return low - margin, high + margin


def _plot_loss(axes: matplotlib.axes.Axes, stage: StageHistory, limits: tuple[float, float], log_scale: bool) -> None:
    """The loss of each logged iteration, light, and its moving average."""
    axes.set_xlabel("iteration", fontsize=TEXT_SIZE, color=INK)
    axes.set_ylabel("training loss", fontsize=TEXT_SIZE, color=INK)
    axes.xaxis.set_major_locator(_whole_numbers())
    if log_scale:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.set_ylim(*limits)
    smooth = _moving_average(stage.losses)
    if np.array_equal(smooth, stage.losses):
        axes.plot(stage.steps, stage.losses, color=BLUE, linewidth=1.2, marker="o", markersize=3)
        return
    axes.plot(stage.steps, stage.losses, color=BLUE, linewidth=0.6, alpha=0.35)
    axes.plot(stage.steps, smooth, color=BLUE, linewidth=1.6)
    _subtitle(axes, "light: as logged; dark: running mean")


def _whole_numbers() -> matplotlib.ticker.MaxNLocator:
    """Places ticks at whole numbers only, however short the axis."""
    return matplotlib.ticker.MaxNLocator(6, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])


def _mean_iou_limits(mean_ious: np.ndarray) -> tuple[float, float]:
    """Tenths around the values, at least two of them apart, inside [0, 1]."""
    if not mean_ious.size:
        return 0.0, 1.0
    low, high = np.floor(10 * mean_ious.min()), np.ceil(10 * mean_ious.max())
    low = min(low, high - 2) if high >= 2 else 0.0
    return low / 10, max(high, 2) / 10


def _plot_mean_iou(
    axes: matplotlib.axes.Axes, stage: StageHistory, limits: tuple[float, float], best_before: float | None
) -> None:
    """The validation mIoU after each epoch, the best one ringed and named."""
    axes.set_xlabel("epoch", fontsize=TEXT_SIZE, color=INK)
    axes.set_ylabel("validation mIoU", fontsize=TEXT_SIZE, color=INK)
    axes.set_ylim(*limits)
    axes.yaxis.set_major_locator(matplotlib.ticker.MultipleLocator(0.1 if limits[1] - limits[0] > 0.25 else 0.05))
    axes.xaxis.set_major_locator(_whole_numbers())
    if not len(stage.epochs):
        return
    axes.set_xlim(np.min(stage.epochs) - 0.5, np.max(stage.epochs) + 0.5)
    axes.plot(stage.epochs, stage.mean_ious, color=BLUE, linewidth=1.4, marker="o", markersize=3.5, clip_on=False)
    best = int(np.argmax(stage.mean_ious))
    ring = {"marker": "o", "markersize": 8, "markerfacecolor": "none", "markeredgewidth": 1.4}
    axes.plot(stage.epochs[best], stage.mean_ious[best], color=VERMILION, clip_on=False, **ring)
    note = f"best: {stage.mean_ious[best]:.3f} after epoch {stage.epochs[best]:g}"
    if best_before is not None:
        axes.axhline(best_before, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
        note += f"; dotted: {best_before:.3f}, best before"
    _subtitle(axes, note)


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


def _plot_results_page(
    examples: Sequence[Example], names: Sequence[str], colours: np.ndarray, path: pathlib.Path
) -> None:
    """One file of `plot_results`."""
    margin, gap, line = 0.12, 0.07, 0.14
    column = (PAGE_WIDTH - 2 * margin - 2 * gap) / 3
    scales = [min(column / e.image.shape[1], MAX_ROW_HEIGHT / e.image.shape[0]) for e in examples]
    captions = [_wrap(_caption(e, names), PAGE_WIDTH - 2 * margin, SMALL_SIZE) for e in examples]
    entries, legend_lines = _legend(examples, names, colours, PAGE_WIDTH - 2 * margin)
    body = sum(scale * e.image.shape[0] + 0.18 for scale, e in zip(scales, examples, strict=True))
    page = new_page(PAGE_WIDTH, 0.32 + body + line * sum(map(len, captions)) + 0.2 * legend_lines + 0.1)
    for index, heading in enumerate(("photograph", "label", "prediction")):
        write(page, margin + column / 2 + index * (column + gap), 0.24, heading, TEXT_SIZE, ha="center", weight="bold")
    top = 0.32
    for example, scale, caption in zip(examples, scales, captions, strict=True):
        height, width = scale * example.image.shape[0], scale * example.image.shape[1]
        for index, picture in enumerate(_pictures(example, colours, scale * DPI)):
            left = margin + index * (column + gap) + (column - width) / 2
            page.imshow(picture, extent=(left, left + width, top + height, top), aspect="auto", interpolation="hanning")
        top += height + 0.06
        for text in caption:
            write(page, margin, top, text, SMALL_SIZE, va="top")
            top += line
        top += 0.12
    _draw_legend(page, entries, margin, top + 0.06)
    save(page.figure, path)


def _pictures(example: Example, colours: np.ndarray, scale: float) -> list[np.ndarray]:
    """The photograph and its two overlays, at one to two times the printed size, so that contours print equally thin.

    Args:
      example: the image, its label and its prediction.
      colours: (C, 3) uint8 RGB.
      scale: printed pixels for each pixel of the image.

    Returns:
      Three (H', W', 3) uint8.
    """
    height, width = example.image.shape[:2]
    zoom = np.ceil(scale) if scale > 1 else 1 / np.floor(1 / scale)
    new_height, new_width = max(1, round(height * zoom)), max(1, round(width * zoom))
    image = np.asarray(Image.fromarray(example.image).resize((new_width, new_height), Image.Resampling.BICUBIC))
    # The nearest pixel's class: a class number has no meaning between two others.
    rows = (np.arange(new_height) * 2 + 1) * height // (2 * new_height)
    columns = (np.arange(new_width) * 2 + 1) * width // (2 * new_width)
    maps = []
    for name, classes in (("label", example.label), ("prediction", example.prediction)):
        if classes.shape != (height, width):
            raise ValueError(f"image of {height}x{width} pixels needs a {name} of that size, not {classes.shape}")
        maps.append(classes[rows[:, None], columns])
    return [image, *(overlay(image, classes, colours) for classes in maps)]


def _caption(example: Example, names: Sequence[str]) -> str:
    """The image's name and IoU where there are any, and the classes predicted, the largest first."""
    counts = np.bincount(np.ravel(example.prediction), minlength=len(names))
    # A name that wraps in its middle reads like two names: no-break spaces.
    found = [
        _shorten(names[index]).replace(" ", "\u00a0") for index in np.argsort(-counts, kind="stable") if counts[index]
    ]
    parts = [_shorten(example.name, 60)] if example.name else []
    parts += [f"mIoU {example.mean_iou:.3f}"] if example.mean_iou is not None else []
    return " · ".join([*parts, "predicted: " + ", ".join(found)])


def _wrap(text: str, width: float, size: float) -> list[str]:
    """Breaks a text at spaces into lines of at most that many inches (a longer word stays whole)."""
    lines: list[str] = []
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(longer, size) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _legend(
    examples: Sequence[Example], names: Sequence[str], colours: np.ndarray, width: float
) -> tuple[list[tuple[float, int, str, np.ndarray]], int]:
    """Sets the classes on the page, and void where a label has it, in lines of at most that many inches.

    Returns:
      (left in inches, line, name, colour) of each entry, and the number of lines.
    """
    label = np.unique(np.concatenate([np.unique(e.label) for e in examples]))
    used = np.union1d(label, np.concatenate([np.unique(e.prediction) for e in examples]))
    inside = (used >= 0) & (used < len(names))
    wanted = [(_shorten(names[index]), colours[index] / 255) for index in used[inside]]
    if not inside.all():
        wanted.append(("void", np.array(VOID_COLOUR) / 255))
    entries, left, row = [], 0.0, 0
    for name, colour in wanted:
        entry_width = 0.2 + text_width(name, TEXT_SIZE) + 0.18
        if left and left + entry_width - 0.18 > width:
            left, row = 0.0, row + 1
        entries.append((left, row, name, colour))
        left += entry_width
    return entries, row + 1


def _draw_legend(page: matplotlib.axes.Axes, entries: list, left: float, top: float) -> None:
    """Draws what `_legend` has set."""
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
