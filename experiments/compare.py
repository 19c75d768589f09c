"""Compares two runs image by image: IoU per class, and the images on which one is better than the other by most."""

import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import tyro

from experiments.arguments import quick_arguments
from experiments.datasets import find_data, options_of, same_data, short_name
from experiments.memory import keep_freed_memory
from experiments.stop import end_on_ctrl_c
from experiments.trained import ModelOptions, classify_source, make_classify, open_run, work_until_stopped
from experiments.workdir import check_folder
from jaxseg.files import replacing, write_json


@dataclasses.dataclass(frozen=True)
@quick_arguments
class Choice:
    """The options of the comparison."""

    run_a: Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="RUN_A")]
    """The workdir of a run, for its best checkpoint, or one checkpoint in it, such as RUN/checkpoints/7."""
    run_b: Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="RUN_B")]
    """The same of another, trained on the same data."""
    split: Literal["val", "test", "train"] = "val"
    """The images that are looked at."""
    images: int = 4
    """How many are drawn on which B is better than A, and as many on which A is better than B."""
    data_dir: pathlib.Path | None = None
    """Where data sets that the program prepares itself are; where RUN_A had them if it is not given."""
    output: pathlib.Path | None = None
    """Folder for the figures, tables and comparison.json; those of an earlier comparison are replaced. By default
    runs/compare-A-B, after the runs' folders."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """What is compared.

    Attributes:
      models: the `jaxseg.inference.Trained` of A and of B.
      titles: what they are called.
      source: the split's images and labels.
      where: the split and its data set, for people.
      settings: the comparison's, as JSON has them.
      output: the folder to write to.
    """

    models: tuple[Any, Any]
    titles: tuple[str, str]
    source: Any
    where: str
    settings: dict[str, Any]
    output: pathlib.Path


def main(argv: list[str] | None = None) -> int:
    """Runs the comparison with the given arguments, or the command line's; returns the exit code."""
    choice = tyro.cli(Choice, prog="python -m experiments.compare", description=__doc__, args=argv)
    keep_freed_memory(may_restart=argv is None)
    end_on_ctrl_c(by_command=argv is None)
    try:
        opened = open_runs(choice)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    def work() -> int:
        compare(opened, choice.images)
        return 0

    return work_until_stopped(work)


def open_runs(choice: Choice) -> Opened:
    """Loads both models and opens the images.

    Raises:
      ValueError: a run or its data cannot be loaded, or the two do not belong together; in one line.
      OSError: a file cannot be read.
    """
    if choice.images < 1:
        raise ValueError(f"--images must be above 0, not {choice.images}")
    runs = (choice.run_a, choice.run_b)
    output = choice.output or pathlib.Path("runs") / f"compare-{_name(runs[0])}-{_name(runs[1])}"
    check_folder(output, "--output")
    if output.is_dir() and any(output.iterdir()) and not (output / "comparison.md").exists():
        raise ValueError(f"--output {output} is not empty and holds no comparison: name another, or empty it")
    models = open_run(runs[0], ModelOptions())[0], open_run(runs[1], ModelOptions())[0]
    options, other = (options_of(model.settings) for model in models)
    if same_data(options) != same_data(other):
        raise ValueError(f"{runs[0]} is of {options.dataset}, {runs[1]} of {other.dataset}: name runs on the same data")
    names, others = (model.labels.names for model in models)
    if names != others:
        raise ValueError(f"the runs' classes differ: {', '.join(names)} in {runs[0]}, {', '.join(others)} in {runs[1]}")
    if choice.data_dir is not None:
        options = dataclasses.replace(options, data_dir=choice.data_dir)
    labels, open_splits = find_data(options, (choice.split,))
    if labels.names != names:
        raise ValueError(f"{options.dataset} has other classes now than the runs: {', '.join(labels.names)}")
    titles = f"A: {_name(runs[0])}", f"B: {_name(runs[1])}"
    source = open_splits()[choice.split]
    where = f"{choice.split} split of {short_name(options.dataset)}"
    settings = {name: str(x) if isinstance(x, pathlib.Path) else x for name, x in vars(choice).items()}
    return Opened(models, titles, source, where, settings, output)


def _name(run: pathlib.Path) -> str:
    """What a run is called: its folder's name, and a checkpoint's number."""
    run = run.expanduser().resolve()
    return f"{run.parent.parent.name}-{run.name}" if run.parent.name == "checkpoints" else run.name


def compare(opened: Opened, number: int) -> None:
    """Classifies all images by both models, and prints, writes and draws how they differ.

    Args:
      opened: from `open_runs`.
      number: how many images to draw on which one model is better, and on which the other is.

    Raises:
      OSError: a file cannot be read or written.
    """
    from experiments.results import missing_letters_once

    confusions, names = classify(opened)
    scores = score_images(confusions)
    totals = confusions.sum(1)
    table = tabulate(opened, totals)
    print(f"\n{table}")
    opened.output.mkdir(parents=True, exist_ok=True)
    with replacing(opened.output / "comparison.md") as new:
        new.write_text(table)
    with missing_letters_once():
        figures = draw(opened, totals, scores, names, number)
    write_json(opened.output / "comparison.json", describe(opened, totals, scores, names, figures))
    for letter, more in (("B", scores[1] > scores[0]), ("A", scores[0] > scores[1])):
        print(f"{letter} has the higher mean IoU on {more.sum()} of {len(names)} images")
    print(f"everything is in {opened.output}: {', '.join(['comparison.md', 'comparison.json', *figures])}")


def classify(opened: Opened) -> tuple[Any, list[str]]:
    """Classifies every image by each model, as its run's own evaluation does.

    Returns:
      (2, N, C, C) int64, the confusion matrix of each model and image, label in rows; the names of the images.
    """
    import numpy as np

    from jaxseg import metrics

    models, source = opened.models, opened.source
    number = models[0].labels.num_classes
    confusions = np.zeros((2, len(source), number, number), np.int64)
    names = [""] * len(source)
    for place, model in enumerate(models):
        for index, item, prediction in predict(model, source, range(len(source)), opened.titles[place]):
            confusions[place, index] = metrics.confusion_on_host(item["label"], prediction, number)
            names[index] = item["name"]
    return confusions, names


def predict(model: Any, source: Any, indices: Sequence[int], title: str) -> Iterator[tuple[int, dict[str, Any], Any]]:
    """Yields, for those images in some order, the index, the example and the class map (H, W) uint8."""
    from tqdm import tqdm

    classify = make_classify(model, model.manner, ModelOptions())
    found = classify_source(classify, model.manner, source, indices)
    yield from tqdm(found, title, len(indices), unit="img", leave=False, disable=None)


def score_images(confusions: Any) -> Any:
    """The mean IoU of each model on each image, (2, N) float64, of confusion matrices (2, N, C, C)."""
    import numpy as np

    from jaxseg import metrics

    return np.array([[metrics.mean_iou(one) for one in each] for each in confusions])


def choose_images(scores: Any, number: int) -> tuple[list[int], list[int]]:
    """Chooses the images on which each of two models is better by most.

    Args:
      scores: (2, N) float: each model's mean IoU on each image.
      number: how many of each, at most.

    Returns:
      Indices of images on which the first is better, and on which the second is, the largest difference first.
    """
    import numpy as np

    gains = scores[1] - scores[0]
    first, second = (np.argsort(sign * gains, kind="stable")[:number].tolist() for sign in (1, -1))
    return [index for index in first if gains[index] < 0], [index for index in second if gains[index] > 0]


def tabulate(opened: Opened, totals: Any) -> str:
    """The IoU of each class by both models, and the difference, as a Markdown table with a line above it.

    Args:
      opened: what is compared.
      totals: (2, C, C) int64, the confusion matrices of the whole split.
    """
    import numpy as np

    from experiments.results import markdown_table
    from jaxseg import metrics

    a, b = (metrics.iou_per_class(total) for total in totals)
    values = [*zip(opened.models[0].labels.names, a, b, strict=True)]
    values.append(("mean_iou", metrics.mean_iou(totals[0]), metrics.mean_iou(totals[1])))
    rows = []
    for name, first, second in values:
        difference = "" if np.isnan(second - first) else f"{second - first:+z.5f}"
        rows.append([name, *("absent" if np.isnan(x) else f"{x:.5f}" for x in (first, second)), difference])
    epochs = "; ".join(
        f"{title}, {model.checkpoint['stage_name']}, epoch {model.checkpoint['epoch']}"
        for title, model in zip(opened.titles, opened.models, strict=True)
    )
    head = f"{opened.where}, {len(opened.source)} images. {epochs}."
    return f"{head}\n\n{markdown_table(['class', *opened.titles, 'difference'], rows)}\n"


def draw(opened: Opened, totals: Any, scores: Any, names: list[str], number: int) -> list[str]:
    """Draws the bars and the pictures in the place of earlier ones; returns the files' names in the output folder."""
    from jaxseg import metrics, plots

    labels, output = opened.models[0].labels, opened.output
    a, b = (metrics.iou_per_class(total) for total in totals)
    means = metrics.mean_iou(totals[0]), metrics.mean_iou(totals[1])
    title = f"IoU per class, {opened.where}"
    plots.plot_class_bars((a, b), means, labels.names, opened.titles, title, output / "classes.png")
    figures = ["classes.png"]
    chosen = choose_images(scores, number)
    shown = [*chosen[0], *chosen[1]]
    maps = [
        {index: prediction for index, _, prediction in predict(model, opened.source, shown, "pictures")}
        for model in opened.models
    ]
    for letter, indices in zip("AB", chosen, strict=True):
        for old in output.glob(f"{letter.lower()}_better_*.png"):
            old.unlink()
        rows = []
        for index in indices:
            item, (first, second) = opened.source[index], scores[:, index]
            caption = f"{names[index]} · mIoU: A {first:.3f}, B {second:.3f} ({second - first:+z.3f})"
            rows.append(plots.Row(item["image"], (item["label"], maps[0][index], maps[1][index]), caption))
        headings = ("photograph", "label", *opened.titles)
        paths = plots.plot_rows(rows, headings, labels.names, labels.colours, output / f"{letter.lower()}_better.png")
        figures += [path.name for path in paths]
    return figures


def describe(opened: Opened, totals: Any, scores: Any, names: list[str], figures: list[str]) -> dict[str, Any]:
    """What comparison.json holds: of each model its checkpoint, IoU per class (null where absent) and on each image."""
    import numpy as np

    from jaxseg import metrics

    record: dict[str, Any] = {"of": opened.where, "settings": opened.settings}
    for letter, title, model, total, own in zip("AB", opened.titles, opened.models, totals, scores, strict=True):
        iou = metrics.iou_per_class(total).tolist()
        record[letter] = {
            "title": title,
            "checkpoint": model.checkpoint,
            "mean_iou": metrics.mean_iou(total),
            "iou": {name: None if np.isnan(x) else x for name, x in zip(model.labels.names, iou, strict=True)},
            "images": dict(zip(names, own.tolist(), strict=True)),
        }
    return {**record, "figures": figures}


if __name__ == "__main__":
    sys.exit(main())
