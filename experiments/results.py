"""What comes out of a run: tables, results.json, figures."""

import contextlib
import dataclasses
import functools
import pathlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from experiments.prepare import Run, count_classes
from jaxseg import metrics, summary, train
from jaxseg.data import loader
from jaxseg.data.labels import Labels
from jaxseg.files import write_json
from jaxseg.log import read_metrics

NUM_PICTURES = 12


@dataclasses.dataclass(frozen=True)
class _Subset:
    """Some items of a source, in the given order."""

    source: Any
    indices: list[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[self.indices[index]]

    def label_sizes(self) -> np.ndarray:
        return self.source.label_sizes()[self.indices]


def print_table(confusion: np.ndarray, labels: Labels, boundary_iou: np.ndarray | None = None) -> None:
    """Prints the IoU table in the report's form, perhaps with boundary IoU, and the best and the worst class."""
    if boundary_iou is not None:
        print("IoU, boundary IoU:")
    print(metrics.iou_table(confusion, labels.names, boundary_iou))
    print(metrics.best_and_worst(confusion, labels.names))


def stage_difference(before: np.ndarray, after: np.ndarray, names: tuple[str, ...]) -> str:
    """One line: what the second stage added to the first, and the classes that gained most and least."""
    first, second = metrics.mean_iou(before), metrics.mean_iou(after)
    line = f"stage 2 added {second - first:+z.4f} to stage 1's mean_iou ({first:.4f} -> {second:.4f})"
    gain = metrics.iou_per_class(after) - metrics.iou_per_class(before)
    if not np.isfinite(gain).any():
        return line
    most, least = int(np.nanargmax(gain)), int(np.nanargmin(gain))
    return f"{line}; most for {names[most]} ({gain[most]:+z.3f}), least for {names[least]} ({gain[least]:+z.3f})"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that can be read as it is, too: a line of cells for each row, the first column to the left."""
    widths = [max(map(len, cells)) for cells in zip(header, *rows, strict=True)]
    rules = ["-" * width if index == 0 else "-" * (width - 1) + ":" for index, width in enumerate(widths)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        texts = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return f"| {' | '.join(texts)} |"

    return "\n".join(map(line, [header, rules, *rows]))


def write_results(
    workdir: pathlib.Path,
    checkpoint_of: dict[str, Any],
    confusions: dict[str, np.ndarray],
    labels: Labels,
    boundary_ious: dict[str, np.ndarray],
) -> None:
    """Writes results.json: for each split mean IoU, IoU per class (null where absent) and the confusion matrix.

    Args:
      workdir: where.
      checkpoint_of: the stage and the epoch that they are of.
      confusions: (C, C) of each split.
      labels: the class names.
      boundary_ious: (C,) of each split for which it was computed, written as IoU is.
    """

    results: dict[str, dict[str, Any]] = {"checkpoint": checkpoint_of}
    for split, confusion in confusions.items():
        results[split] = describe_scores(confusion, labels, boundary_ious.get(split))
    write_json(workdir / "results.json", results)


def describe_scores(confusion: np.ndarray, labels: Labels, boundary_iou: np.ndarray | None = None) -> dict[str, Any]:
    """The scores of a split as results.json has them; arguments as `print_table`'s."""

    def by_name(iou: np.ndarray) -> dict[str, float | None]:
        return {
            name: None if np.isnan(value) else value for name, value in zip(labels.names, iou.tolist(), strict=True)
        }

    scores = {"mean_iou": metrics.mean_iou(confusion), "iou": by_name(metrics.iou_per_class(confusion))}
    if boundary_iou is not None:
        scores["mean_boundary_iou"] = metrics.mean_over_classes(boundary_iou)
        scores["boundary_iou"] = by_name(boundary_iou)
    return {**scores, "confusion": confusion.tolist()}


def draw(run: Run, variables: Any, confusion: np.ndarray, title: str) -> None:
    """Draws the figures of a run below `workdir/figures`; the title says what the confusion matrix is of."""
    with missing_letters_once():
        _draw(run, variables, confusion, title)


@contextlib.contextmanager
def missing_letters_once() -> Iterator[None]:
    """Within it figures are drawn; of all letters that their font lacks it warns in one line."""
    with warnings.catch_warnings(record=True) as caught:
        yield
    # Matplotlib warns of every letter, in two lines.
    missing = [warning for warning in caught if "missing from font" in str(warning.message)]
    if missing:
        print("warning: the figures' font lacks letters of the class names: boxes stand for them", file=sys.stderr)
    for warning in caught:
        if warning not in missing:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _draw(run: Run, variables: Any, confusion: np.ndarray, title: str) -> None:
    # Imported only now: matplotlib takes half a second, and training need not wait for it.
    from jaxseg import plots

    directory = run.settings.workdir / "figures"
    directory.mkdir(exist_ok=True)
    history = []
    for number, stage in run.stages.items():
        steps, epochs = (read_metrics(run.settings.workdir, kind, number) for kind in ("step", "epoch"))
        row = (steps["step"], steps["loss"], epochs["epoch"], epochs["mean_iou"])
        history.append(plots.StageHistory(stage.name, *row))
    plots.plot_training(history, directory, first=min(run.stages))
    settings = run.settings
    layers = summary.list_layers(run.model, settings.image_size)
    parts = f"{settings.encoder} and {type(run.model.decoder).__name__}"
    plots.plot_architecture(layers, settings.image_size, parts, directory / "architecture.png")
    plots.plot_confusion(confusion, run.labels.names, directory / "confusion.png", title)
    source = run.splits["val"]
    counts = count_classes(source, run.labels.num_classes)
    chosen = plots.choose_examples(counts, min(NUM_PICTURES, len(source)))
    predictions = predict(run, variables, _Subset(source, chosen))
    examples = []
    for index, prediction in zip(chosen, predictions, strict=True):
        item = source[index]
        counted = metrics.confusion_matrix(item["label"], prediction, run.labels.num_classes)
        score = metrics.mean_iou(np.asarray(counted))
        examples.append(plots.Example(item["image"], item["label"], prediction, item["name"], score))
    plots.plot_results(examples, run.labels.names, run.labels.colours, directory / "results.png")


def predict(run: Run, variables: Any, source: Any) -> list[np.ndarray]:
    """The class map of each image of a source, (h, w) int32 at its label's size."""
    settings = run.settings
    native = settings.eval_size == "native"
    # Of several processes only one draws: the others' devices take no part.
    devices = train.local_devices(run.devices)
    step = functools.partial(train.predict_step, model=run.model, native=native)
    step_fn = train.pmap_step(step, devices, per_image=True)
    variables = train.replicate(variables, devices)
    image_size = None if native else settings.image_size
    maps: dict[int, np.ndarray] = {}
    batches = loader.eval_batches(source, image_size=image_size, batch_size=settings.batch_size)
    for batch in train.batches_on_devices(batches, devices):
        together = (np.asarray(x).reshape(-1, *x.shape[2:]) for x in (batch["index"], step_fn(variables, batch)))
        maps |= dict(zip(*together, strict=True))
    sizes = source.label_sizes()
    return [maps[index][:height, :width] for index, (height, width) in enumerate(sizes)]
