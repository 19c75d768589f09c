"""Scores a trained run, or the class maps that any other program made, on the labels of a data set."""

import csv
import dataclasses
import heapq
import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from experiments.arguments import quick_arguments
from experiments.class_maps import UnfitError, find_class_maps, read_class_maps
from experiments.datasets import DataOptions, find_data, options_of, same_data, short_name
from experiments.memory import keep_freed_memory
from experiments.stop import end_on_ctrl_c
from experiments.trained import (
    ModelOptions,
    classify_source,
    describe,
    make_classify,
    open_run,
    work_until_stopped,
)
from experiments.workdir import check_folder

if TYPE_CHECKING:
    import numpy as np

    from jaxseg.data.labels import Labels


@dataclasses.dataclass(frozen=True)
@quick_arguments
class Settings(ModelOptions, DataOptions):
    """Settings of an evaluation."""

    what: Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="RUN_OR_FOLDER", name="what")] = (
        dataclasses.field(kw_only=True)
    )
    """The workdir of a run, or one checkpoint in it, such as RUN/checkpoints/7; or a folder with a PNG of class indices
    for each image, of its stem and size, whoever made it: with such a folder --dataset must be given, and the options
    of the model mean nothing."""
    dataset: str = ""
    """The data set, as in training, by default the run's own: `shapes`, `folder:DIR` or another that
    `python -m experiments.baseline --help` lists."""
    split: Literal["train", "val", "test"] = "test"
    """Which of its splits."""
    output: pathlib.Path | None = None
    """Folder for what is found: evaluation.json, images.csv, confusion.png and worst_*.png, in the place of those of an
    earlier evaluation. By default evaluation-DATASET-SPLIT in the run's workdir, or in the folder of class maps."""
    boundary_iou: bool = False
    """Add boundary IoU (Cheng et al. 2021; 2 % of each image's diagonal wide)."""
    worst: int = 12
    """How many images are drawn, those with the lowest mean IoU; all are listed in images.csv."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """What is evaluated.

    Attributes:
      about: what evaluation.json says of it.
      title: the same, in a line.
      labels: the class names and colours.
      source: the split.
      predictions: gives, once, the index, the example and the class map (H, W) of each image.
      output: the folder to write to.
    """

    about: dict[str, Any]
    title: str
    labels: "Labels"
    source: Any
    predictions: Iterable[tuple[int, dict[str, Any], Any]]
    output: pathlib.Path


def main(argv: list[str] | None = None) -> int:
    """Runs the command with the given arguments, or the command line's; returns the exit code."""
    settings = tyro.cli(Settings, prog="python -m experiments.evaluate", description=__doc__, args=argv)
    keep_freed_memory(may_restart=argv is None)
    end_on_ctrl_c(by_command=argv is None)
    try:
        if settings.worst < 0:
            raise ValueError(f"--worst must be 0 or more, not {settings.worst}")
        opened = open_run_to_evaluate(settings) if is_run(settings.what) else open_class_maps(settings)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(opened.title)

    def work() -> int:
        try:
            evaluate(opened, settings)
        except UnfitError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0

    return work_until_stopped(work)


def is_run(path: pathlib.Path) -> bool:
    """Whether this is a run's workdir, or a checkpoint, rather than a folder of class maps."""
    if path.name == "checkpoints":
        path = path.parent
    return (path / "checkpoints").is_dir() or (path / "config.json").exists() or (path / "model").is_dir()


def open_run_to_evaluate(settings: Settings) -> Opened:
    """Loads the run and opens the data; raises ValueError, in one line, or OSError, where something does not fit."""
    run = settings.what.parent if settings.what.name == "checkpoints" else settings.what
    trained, manner = open_run(run, settings)
    data = data_of(settings, trained.settings)
    home, name = (run.parent.parent, f"-{run.name}") if run.parent.name == "checkpoints" else (run, "")
    output = choose_output(settings, data, home, name)
    labels, open_split = find_data(data, (settings.split,))
    if labels.num_classes != trained.labels.num_classes:
        raise ValueError(
            f"{data.dataset} has {labels.num_classes} classes, but {run} was trained for {trained.labels.num_classes}"
        )
    if labels.names != trained.labels.names:
        pairs = zip(labels.names, trained.labels.names, strict=True)
        index, (here, there) = next((index, pair) for index, pair in enumerate(pairs) if pair[0] != pair[1])
        print(f"warning: class {index} is {here} in {data.dataset} and {there} in the run", file=sys.stderr)
    source = open_split()[settings.split]
    classify = make_classify(trained, manner, settings)
    about = {
        "run": str(run),
        "checkpoint": {"stage": trained.checkpoint["stage_name"], "epoch": trained.checkpoint["epoch"]},
        "image_size": manner.image_size and list(manner.image_size),
        "flip": manner.flip,
        "scales": list(manner.scales),
        "dtype": settings.dtype or trained.settings.get("dtype", "float32"),
    }
    predictions = classify_source(classify, manner, source, range(len(source)))
    return Opened(about, describe(trained, manner), labels, source, predictions, output)


def open_class_maps(settings: Settings) -> Opened:
    """Opens the data and lists the class maps; raises as `open_run_to_evaluate` does."""
    folder = settings.what
    maps = find_class_maps(folder)
    if not settings.dataset:
        raise ValueError(f"{folder} holds class maps, no run: give the --dataset that they are of")
    data = data_of(settings, {})
    output = choose_output(settings, data, folder)
    labels, open_split = find_data(data, (settings.split,))
    source = open_split()[settings.split]
    title = f"{len(maps)} class maps in {folder}"
    predictions = read_class_maps(folder, maps, labels, source)
    return Opened({"class_maps": str(folder)}, title, labels, source, predictions, output)


def data_of(settings: Settings, run: dict[str, Any]) -> DataOptions:
    """The options of the data set: the run's own, but for those that are given; without a run those that are given."""
    fields = {field.name: field.default for field in dataclasses.fields(DataOptions)}
    given = {name: getattr(settings, name) for name in fields}
    own = options_of(run)
    if settings.dataset and (
        not run or same_data(DataOptions(settings.dataset)) != same_data(DataOptions(own.dataset))
    ):
        return DataOptions(**given)
    changed = {name: value for name, value in given.items() if name != "dataset" and value != fields[name]}
    return dataclasses.replace(own, **changed)


def choose_output(settings: Settings, data: DataOptions, home: pathlib.Path, name: str = "") -> pathlib.Path:
    """The folder to write to; raises ValueError unless it is new, empty, or that of an earlier evaluation."""
    output = settings.output or home / f"evaluation{name}-{short_name(data.dataset)}-{settings.split}"
    check_folder(output, "--output")
    if output.is_dir() and any(output.iterdir()) and not (output / "evaluation.json").exists():
        raise ValueError(f"--output {output} is not empty and holds no evaluation: name another, or empty it")
    return output


def evaluate(opened: Opened, settings: Settings) -> None:
    """Counts, prints, writes and draws.

    Raises:
      UnfitError: class maps do not belong to the images.
      OSError: a file cannot be written.
    """
    import numpy as np
    from tqdm import tqdm

    from experiments.results import describe_scores, print_table
    from jaxseg import boundary, metrics
    from jaxseg.files import write_json

    labels, source, output = opened.labels, opened.source, opened.output
    number = labels.num_classes
    count = make_boundary_count(source, number) if settings.boundary_iou else None
    total = np.zeros((2 * number, 2 * number) if count else (number, number), np.int64)
    rows: list[tuple[str, float, np.ndarray]] = []
    worst: list[tuple[float, int, Any]] = []
    predictions = tqdm(opened.predictions, "evaluating", len(source), unit="img", smoothing=0.1, disable=None)
    for index, item, classes in predictions:
        confusion = metrics.confusion_on_host(item["label"], classes, number)
        total += count(item["label"], classes) if count else confusion
        iou = metrics.iou_per_class(confusion)
        mean = float(np.nanmean(iou)) if np.isfinite(iou).any() else float("nan")
        rows.append((item["name"], mean, iou))
        if np.isfinite(mean) and settings.worst:
            # The heap's first is the best of the worst; an index is there once, so that examples are never compared.
            (heapq.heappush if len(worst) < settings.worst else heapq.heappushpop)(
                worst, (-mean, -index, (item, classes))
            )
    boundary_iou = boundary.boundary_iou_per_class(total) if count else None
    confusion = boundary.without_boundary(total) if count else total
    print(f"\n{settings.split} split, {len(source)} images:")
    print_table(confusion, labels, boundary_iou)
    output.mkdir(parents=True, exist_ok=True)
    scores = describe_scores(confusion, labels, boundary_iou)
    write_json(output / "evaluation.json", {**opened.about, "images": len(source), settings.split: scores})
    write_images(output / "images.csv", rows, labels)
    figures = draw(opened, settings, confusion, sorted(worst, key=lambda one: (-one[0], -one[1])))
    print(f"\neverything is in {output}: {', '.join(['evaluation.json', 'images.csv', *figures])}")


def make_boundary_count(source: Any, num_classes: int) -> Callable[["np.ndarray", "np.ndarray"], "np.ndarray"]:
    """Builds (label, classes) -> `boundary_confusion` (2C, 2C) of one image, which compiles once for all sizes."""
    import functools

    import jax
    import numpy as np

    from jaxseg import boundary
    from jaxseg.data.labels import IGNORE_LABEL

    canvas = tuple(int(length) for length in source.label_sizes().max(0))
    count_on_device = jax.jit(functools.partial(boundary.boundary_confusion, num_classes=num_classes))

    def pad(classes: np.ndarray, value: int) -> np.ndarray:
        padded = np.full((1, *canvas), value, np.uint8)
        padded[0, : classes.shape[0], : classes.shape[1]] = classes
        return padded

    def count(label: np.ndarray, classes: np.ndarray) -> np.ndarray:
        width = boundary.boundary_width(np.array([label.shape]))
        return np.asarray(count_on_device(pad(label, IGNORE_LABEL), pad(classes, 0), width))

    return count


def write_images(path: pathlib.Path, rows: list[tuple[str, float, Any]], labels: "Labels") -> None:
    """Lists the images from the worst to the best: mean IoU, IoU of each class; empty where there is none."""
    from jaxseg.files import replacing

    def text(value: float) -> str:
        return "" if value != value else f"{value:.6f}"

    with replacing(path) as new, new.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "mean_iou", *labels.names])
        for name, mean, iou in sorted(rows, key=lambda row: (row[1] != row[1], row[1], row[0])):
            writer.writerow([name, text(mean), *map(text, iou.tolist())])


def draw(opened: Opened, settings: Settings, confusion: Any, worst: list[tuple[float, int, Any]]) -> list[str]:
    """Draws the confusion matrix and the worst images, and lists these; returns the files' names."""
    from experiments.results import missing_letters_once
    from jaxseg import plots

    labels, output = opened.labels, opened.output
    for old in output.glob("worst_*.png"):
        old.unlink()
    examples = [
        plots.Example(item["image"], item["label"], classes, item["name"], -negative)
        for negative, _, (item, classes) in worst
    ]
    with missing_letters_once():
        plots.plot_confusion(confusion, labels.names, output / "confusion.png", f"{settings.split} split")
        paths = plots.plot_results(examples, labels.names, labels.colours, output / "worst.png")
    if examples:
        print(f"\nthe worst of {len(opened.source)} images, by their own mean IoU:")
        print("\n".join(f"{example.mean_iou:.4f}  {example.name}" for example in examples))
    return ["confusion.png", *(path.name for path in paths)]


if __name__ == "__main__":
    sys.exit(main())
