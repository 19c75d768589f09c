"""What the experiments have left in their folders, recognised by what is in them, and the commands that made it."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from experiments import ablation, end_to_end, filtering
from experiments.commands import to_command
from experiments.datasets import DataOptions, options_of, same_data

# By the decoder that a run's config.json names.
EXPERIMENTS = {"BaselineDecoder": "baseline", "ImprovedDecoder": "improved"}


class Table(NamedTuple):
    """Texts in rows and columns."""

    header: list[str]
    rows: list[list[str]]


class Figure(NamedTuple):
    """A picture's file, what it shows, and whether it is a chart rather than photographs."""

    path: pathlib.Path
    caption: str
    chart: bool


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage of a run recorded.

    Attributes:
      number: 1 or 2.
      epochs: those that were validated.
      mean_ious: after each of them.
    """

    number: int
    epochs: list[int]
    mean_ious: list[float]


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A run of `experiments.baseline` or `experiments.improved`, which need not be over.

    Attributes:
      folder: its workdir.
      title: what it is called here: the name of its folder.
      experiment: 'baseline', 'improved', or None where an older version did not say it.
      settings: its options, as JSON has them.
      names: of its classes.
      colours: (red, green, blue) of each.
      images: how many there are in each split.
      results: of the best epoch, as results.json has them, or None.
      stages: those that have begun.
      outcome: a sentence where it has no results.
    """

    folder: pathlib.Path
    title: str
    experiment: str | None
    settings: dict[str, Any]
    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    images: dict[str, int]
    results: dict[str, Any] | None
    stages: list[Stage]
    outcome: str

    @property
    def command(self) -> str:
        """What trained it."""
        if self.experiment is None:
            return ""
        return to_command(self.experiment, {**self.settings, "workdir": str(self.folder)})

    @property
    def data(self) -> DataOptions:
        """Which images it was trained on; two runs may be compared where these are equal."""
        return same_data(options_of(self.settings))

    def figures(self, pattern: str) -> list[pathlib.Path]:
        """Those of its figures whose names match, in their order."""
        return sorted((self.folder / "figures").glob(pattern), key=lambda path: (len(path.name), path.name))


@dataclasses.dataclass(frozen=True)
class Part:
    """What another experiment has left, ready to be shown.

    Attributes:
      kind: 'ablation', 'end_to_end', 'comparison' or 'filtering'.
      folder: where it is.
      command: what made it, or "" where that is not known.
      texts: paragraphs.
      table: the numbers, or None.
      figures: the pictures that are there.
    """

    kind: str
    folder: pathlib.Path
    command: str
    texts: list[str]
    table: Table | None
    figures: list[Figure]


def read_folders(folders: Sequence[pathlib.Path]) -> tuple[list[TrainedRun], list[Part]]:
    """Reads what is in the folders, each in the order given.

    Raises:
      ValueError: a folder is none of an experiment's, or something in it is damaged; in one line.
      OSError: a file cannot be read.
    """
    runs, parts = [], []
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder: name the workdir of a run, or what another experiment wrote")
        if (folder / "config.json").is_file():
            runs.append(_read_run(folder))
            continue
        read = next((read for name, read in _READERS.items() if (folder / name).is_file()), None)
        if read is None:
            raise ValueError(
                f"{folder}: no run, and nothing that another experiment wrote: it holds neither config.json nor"
                f" {', '.join(list(_READERS)[:-1])}"
            )
        parts.append(read(folder))
    names = [run.title for run in runs]
    return [_with_title(run, names) for run in runs], parts


def _with_title(run: TrainedRun, names: list[str]) -> TrainedRun:
    """Calls a run by its whole path where another's folder has the same name."""
    return dataclasses.replace(run, title=str(run.folder)) if names.count(run.title) > 1 else run


def _read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the encoding, too
        raise ValueError(f"{path} is damaged ({error})") from None


@contextlib.contextmanager
def _blaming(path: pathlib.Path) -> Iterator[None]:
    """Within it, what is missing or of another kind is the file's fault."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is damaged, or of another version ({error!r})") from error


def _read_run(folder: pathlib.Path) -> TrainedRun:
    from jaxseg.log import read_metrics

    config, results, outcome = _read_json(folder / "config.json"), None, "It is not over."
    if (folder / "results.json").is_file():
        results, outcome = _read_json(folder / "results.json"), ""
    elif (folder / "diverged.json").is_file():
        with _blaming(folder / "diverged.json"):
            diverged = _read_json(folder / "diverged.json")
            outcome = f"It diverged at update {int(diverged['step'])}: {diverged['message']}"
    stages = []
    if (folder / "metrics.csv").is_file():
        with _blaming(folder / "metrics.csv"):
            for number in (1, 2):
                steps, epochs = (read_metrics(folder, kind, number) for kind in ("step", "epoch"))
                if steps["loss"].size:
                    stages.append(Stage(number, [int(epoch) for epoch in epochs["epoch"]], epochs["mean_iou"].tolist()))
    with _blaming(folder / "config.json"):
        colours = tuple((int(red), int(green), int(blue)) for red, green, blue in config["colours"])
        names = tuple(map(str, config["names"]))
        images = {str(split): int(number) for split, number in config["images"].items()}
        run = TrainedRun(
            folder=folder,
            title=folder.resolve().name,
            experiment=EXPERIMENTS.get(config.get("decoder")),
            settings=dict(config["settings"]),
            names=names,
            colours=colours,
            images=images,
            results=results,
            stages=stages,
            outcome=outcome,
        )
        _check_settings(run.settings)
        # Asked for once, here, where what is wrong with it is the file's fault.
        _ = run.command, run.data
    if results is not None:
        with _blaming(folder / "results.json"):
            _check_results(results, names)
    return run


def _check_settings(settings: dict[str, Any]) -> None:
    """Raises an error of some kind unless those that are reported are there and of the right kinds."""
    float(settings["batch_size"]), float(settings.get("max_degrees") or 0), float(settings.get("encoder_rate", 1))
    lengths = {"image_size": 2, "epochs": 2, "learning_rate": 2, "dropout": 2, "scale_range": 2, "jitter": 4}
    for name, length in lengths.items():
        # Older versions had neither dropout nor the two after it.
        required = name in ("image_size", "epochs", "learning_rate")
        if (required or name in settings) and len(list(map(float, settings[name]))) != length:
            raise ValueError(f"its {name} is {settings[name]}")


def _check_results(results: dict[str, Any], names: tuple[str, ...]) -> None:
    """Raises an error of some kind unless the results are those of these classes."""
    str(results["checkpoint"]["stage"]), int(results["checkpoint"]["epoch"])
    for split in ("val", "test"):
        if split not in results:
            continue
        float(results[split]["mean_iou"])
        for name in names:
            if results[split]["iou"][name] is not None:
                float(results[split]["iou"][name])
        if [len(row) for row in results[split]["confusion"]] != [len(names)] * len(names):
            raise ValueError("its confusion matrix has another size")


def _read_series(folder: pathlib.Path, kind: str, tabulate: Callable[[list[dict[str, Any]]], Any]) -> Part:
    """An ablation or an end-to-end experiment."""
    path = folder / f"{kind}.json"
    record = _read_json(path)
    with _blaming(path):
        rows, texts = record["rows"], _first_paragraph(folder / f"{kind}.md")
        if record["unfinished"]:
            texts.append(f"Not over yet: {', '.join(record['unfinished'])}.")
        settings = dict(record["settings"])
        if kind == "ablation":
            settings |= next((row["settings"] for row in rows if row["name"] == "dropout"), {})
            more = {"seeds": sorted({row["seed"] for row in rows})}
        else:
            more = {"learning_rates": [row["settings"]["learning_rate"][0] for row in rows]}
            settings |= {"seed": rows[0]["seed"]} if rows else {}
        settings["workdir"] = str(folder)
        table = Table(*tabulate(rows)) if rows else None
        command = to_command(kind, settings, more if rows else {})
    return Part(kind, folder, command, texts, table, [])


def _read_ablation(folder: pathlib.Path) -> Part:
    part = _read_series(folder, "ablation", lambda rows: ablation.tabulate(ablation.summarise(rows)))
    figures = {"figures/ablation.png": "Mean IoU of each variant"}
    return dataclasses.replace(part, figures=_there(folder, figures, charts=tuple(figures)))


def _read_end_to_end(folder: pathlib.Path) -> Part:
    part = _read_series(folder, "end_to_end", lambda rows: end_to_end.tabulate(folder, rows))
    captions = ("Training loss at each learning rate", "Validation mean IoU at each learning rate")
    figures = dict(zip(end_to_end.FIGURES.values(), captions, strict=True))
    return dataclasses.replace(part, figures=_there(folder, figures, charts=tuple(figures)))


def _read_comparison(folder: pathlib.Path) -> Part:
    path = folder / "comparison.json"
    record = _read_json(path)
    with _blaming(path):
        titles = [str(record[letter]["title"]) for letter in "AB"]
        settings = record.get("settings", {})
        runs = [str(settings.pop(name)) for name in ("run_a", "run_b") if name in settings]
        command = to_command("compare", {**settings, "output": str(folder)}, positional=runs) if runs else ""
    figures = {"classes.png": "IoU of each class by both"}
    for letter, title in zip("BA", reversed(titles), strict=True):
        for place in sorted(folder.glob(f"{letter.lower()}_better_*.png")):
            figures[place.name] = f"Images on which {title} is better by most"
    texts = _first_paragraph(folder / "comparison.md")
    return Part("comparison", folder, command, texts, None, _there(folder, figures, charts=("classes.png",)))


def _read_filtering(folder: pathlib.Path) -> Part:
    captions = {
        24: "Gaussian blur",
        25: "I_x, I_y and the gradient's magnitude",
        26: "The magnitude without and with blur",
    }
    path, texts, command = folder / filtering.RECORD, [], ""
    if path.is_file():
        record = _read_json(path)
        with _blaming(path):
            texts = [f"{record['image']}."]
            captions = {number: f"{caption}. {record['texts'][str(number)]}" for number, caption in captions.items()}
            settings = {**record["settings"], "output": str(folder)}
            image = settings.pop("image")
            command = to_command("filtering", settings, positional=[] if image is None else [str(image)])
    figures = {filtering.FIGURES[number]: caption for number, caption in captions.items()}
    return Part("filtering", folder, command, texts, None, _there(folder, figures))


def _first_paragraph(path: pathlib.Path) -> list[str]:
    """What stands above the table in an experiment's Markdown file, if there is one."""
    return [path.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]] if path.is_file() else []


def _there(folder: pathlib.Path, figures: Mapping[str, str], charts: Sequence[str] = ()) -> list[Figure]:
    """Those of the figures, captions by name, that are in the folder."""
    return [Figure(folder / name, text, name in charts) for name, text in figures.items() if (folder / name).is_file()]


# By the file that says what a folder holds.
_READERS: dict[str, Callable[[pathlib.Path], Part]] = {
    "ablation.json": _read_ablation,
    "end_to_end.json": _read_end_to_end,
    "comparison.json": _read_comparison,
    filtering.RECORD: _read_filtering,
    # A filtering of a version that wrote figures alone.
    filtering.FIGURES[24]: _read_filtering,
}
