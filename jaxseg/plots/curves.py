"""Training curves: loss and validation mIoU."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import matplotlib.axes
import matplotlib.colors
import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jaxseg.plots.page import (
    BLUE,
    FAINT,
    INK,
    MUTED,
    PAGE_WIDTH,
    SMALL_SIZE,
    TEXT_SIZE,
    TITLE_SIZE,
    VERMILION,
    new_figure,
    save,
    write,
)


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


class Curve(NamedTuple):
    """What one of several runs recorded in a stage; all values finite.

    Attributes:
      name: such as "learning rate 0.001".
      note: below the name, such as "best: 0.431 after epoch 7"; may be empty.
      stage: the curves.
      ended: the run ended early, there: its last loss is marked.
    """

    name: str
    note: str
    stage: StageHistory
    ended: bool = False


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
    log_scale = _falls_tenfold(history)
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


def plot_losses(curves: Sequence[Curve], title: str, path: pathlib.Path) -> None:
    """Draws the running mean of the training loss of several runs into one figure, and where one of them ended early.

    Args:
      curves: the runs, in the order of what distinguishes them, which gives the colours.
      title: above the figure.
      path: the PNG file to write.
    """
    smooth = [_moving_average(curve.stage.losses) for curve in curves]
    log_scale = _falls_tenfold([curve.stage for curve in curves])
    axes = _shared_panel(curves, title)
    _label_loss_axis(axes, log_scale)
    axes.set_ylim(*_loss_limits(np.concatenate([np.zeros(0), *smooth]), log_scale))
    for curve, values, colour in zip(curves, smooth, _ordered_colours(len(curves)), strict=True):
        marker = "o" if len(values) == 1 else None
        axes.plot(curve.stage.steps, values, color=colour, linewidth=1.4, marker=marker, markersize=3)
        if curve.ended and len(values):
            axes.plot(curve.stage.steps[-1], values[-1], color=colour, marker="X", markersize=7, clip_on=False)
    if any(
        len(values) and not np.array_equal(values, c.stage.losses) for c, values in zip(curves, smooth, strict=True)
    ):
        _subtitle(axes, "running mean")
    save(axes.figure, path)


def plot_mean_ious(curves: Sequence[Curve], title: str, path: pathlib.Path) -> None:
    """Draws the validation mIoU of several runs into one figure, each run's best epoch ringed; as `plot_losses`."""
    axes = _shared_panel(curves, title)
    limits = _mean_iou_limits(np.concatenate([np.zeros(0), *(curve.stage.mean_ious for curve in curves)]))
    _label_mean_iou_axis(axes, limits)
    for curve, colour in zip(curves, _ordered_colours(len(curves)), strict=True):
        epochs, values = curve.stage.epochs, curve.stage.mean_ious
        axes.plot(epochs, values, color=colour, linewidth=1.4, marker="o", markersize=3, clip_on=False)
        if len(values):
            best = _last_best(values)
            ring: dict[str, Any] = {"marker": "o", "markersize": 8, "markerfacecolor": "none", "markeredgewidth": 1.2}
            axes.plot(epochs[best], values[best], color=colour, clip_on=False, **ring)
    _subtitle(axes, "ringed: the best epoch")
    save(axes.figure, path)


def _shared_panel(curves: Sequence[Curve], title: str) -> matplotlib.axes.Axes:
    """Axes for several runs on a figure of their own, with the runs' names and notes at the right."""
    figure = new_figure(PAGE_WIDTH, max(3.4, 0.8 + 0.42 * len(curves)))
    height = figure.get_figheight()
    write(figure, 0.085, 1 - 0.12 / height, title, TITLE_SIZE, weight="bold", va="top")
    axes = _panel(figure, (0.085, 0.45 / height, 0.61, 1 - 0.98 / height))
    for index, (curve, colour) in enumerate(zip(curves, _ordered_colours(len(curves)), strict=True)):
        y = 1 - (0.66 + 0.42 * index) / height
        figure.add_artist(Line2D([0.73, 0.755], [y, y], color=colour, linewidth=2, solid_capstyle="butt"))
        write(figure, 0.768, y, curve.name, TEXT_SIZE, va="center_baseline")
        write(figure, 0.768, y - 0.16 / height, curve.note, SMALL_SIZE, color=MUTED, va="center_baseline")
    return axes


def _ordered_colours(number: int) -> list[str]:
    """Colours from dark to light, which differ in brightness too; the lightest can still be seen on white."""
    viridis = matplotlib.colormaps["viridis"]
    return [matplotlib.colors.to_hex(viridis(place)) for place in np.linspace(0, 0.9, number)]


def _falls_tenfold(history: Sequence[StageHistory]) -> bool:
    """Whether a logarithmic axis suits the losses."""
    losses = np.concatenate([np.zeros(0), *(np.asarray(stage.losses, float) for stage in history)])
    trend = np.concatenate([np.zeros(0), *(_moving_average(stage.losses) for stage in history)])
    return bool(losses.size > 0 and losses.min() > 0 and trend.max() >= 10 * trend.min())


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
    _label_loss_axis(axes, log_scale)
    axes.set_ylim(*limits)
    smooth = _moving_average(stage.losses)
    if np.array_equal(smooth, stage.losses):
        axes.plot(stage.steps, stage.losses, color=BLUE, linewidth=1.2, marker="o", markersize=3)
        return
    axes.plot(stage.steps, stage.losses, color=BLUE, linewidth=0.6, alpha=0.35)
    axes.plot(stage.steps, smooth, color=BLUE, linewidth=1.6)
    _subtitle(axes, "light: as logged; dark: running mean")


def _label_loss_axis(axes: matplotlib.axes.Axes, log_scale: bool) -> None:
    axes.set_xlabel("iteration", fontsize=TEXT_SIZE, color=INK)
    axes.set_ylabel("training loss", fontsize=TEXT_SIZE, color=INK)
    axes.xaxis.set_major_locator(_whole_numbers())
    if log_scale:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())


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
    _label_mean_iou_axis(axes, limits)
    if not len(stage.epochs):
        return
    axes.set_xlim(np.min(stage.epochs) - 0.5, np.max(stage.epochs) + 0.5)
    axes.plot(stage.epochs, stage.mean_ious, color=BLUE, linewidth=1.4, marker="o", markersize=3.5, clip_on=False)
    best = _last_best(stage.mean_ious)
    ring: dict[str, Any] = {"marker": "o", "markersize": 8, "markerfacecolor": "none", "markeredgewidth": 1.4}
    axes.plot(stage.epochs[best], stage.mean_ious[best], color=VERMILION, clip_on=False, **ring)
    note = f"best: {stage.mean_ious[best]:.3f} after epoch {stage.epochs[best]:g}"
    if best_before is not None:
        axes.axhline(best_before, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
        note += f"; dotted: {best_before:.3f}, best before"
    _subtitle(axes, note)


def _last_best(values: np.ndarray) -> int:
    """The place of the largest value, of equals the last: so the best checkpoint is chosen."""
    return len(values) - 1 - int(np.argmax(values[::-1]))


def _label_mean_iou_axis(axes: matplotlib.axes.Axes, limits: tuple[float, float]) -> None:
    axes.set_xlabel("epoch", fontsize=TEXT_SIZE, color=INK)
    axes.set_ylabel("validation mIoU", fontsize=TEXT_SIZE, color=INK)
    axes.set_ylim(*limits)
    axes.yaxis.set_major_locator(matplotlib.ticker.MultipleLocator(0.1 if limits[1] - limits[0] > 0.25 else 0.05))
    axes.xaxis.set_major_locator(_whole_numbers())
