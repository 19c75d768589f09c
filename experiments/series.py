"""Experiments of several runs: one after another, each in a subfolder of the workdir, and a file that tells of all.

The file is `WORKDIR/EXPERIMENT.json`. It is written before the first run and after each:

    {"experiment": "ablation",
     "settings": {option: value, ...},             as in a run's config.json, those that all runs have in common
     "rows": [                                     a run that is over, in the experiment's order
       {"name": "batch-norm", "title": "+ batch norm", "seed": 0,
        "settings": {option: value, ...},          those options in which the runs differ
        "decoder": "ImprovedDecoder",
        "run": "batch-norm-seed-0",                the run's folder, relative to the workdir
        "checkpoint": {"stage": ..., "epoch": 2},  the best epoch by validation; null where the run diverged
        "val": {"mean_iou": 0.5, "iou": {class: 0.4 or null, ...}},                    null where the run diverged
        "test": as "val",                          null, too, where the data has no test split
        "diverged": null                           or {"step": 17, "message": "the loss is nan ..."}
       }, ...],
     "unfinished": ["rotation-seed-0", ...]}       folders of the runs that are not over

and when all are over, with what the experiment adds: "figures", "table" (paths relative to the workdir), "summary".
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from experiments.datasets import find_data
from experiments.prepare import FindData, MakeDecoder
from experiments.processes import Mistake, Processes
from experiments.run import check_equal, run_once, work_together
from experiments.settings import Settings, differences, to_json
from experiments.stages import DivergedError
from experiments.workdir import check_folder, check_workdir
from jaxseg.files import write_json


@dataclasses.dataclass(frozen=True)
class Variant:
    """One run of an experiment.

    Attributes:
      name: what is tried, in the names of folders.
      title: the same in tables and figures.
      settings: complete; the workdir is that of the whole experiment.
      make_decoder: (num_classes, dropout_rate) -> decoder.
    """

    name: str
    title: str
    settings: Settings
    make_decoder: MakeDecoder

    @property
    def folder(self) -> str:
        """The run's own, below the experiment's workdir."""
        return f"{self.name}-seed-{self.settings.seed}"


@dataclasses.dataclass(frozen=True)
class Series:
    """What an experiment of several runs is made of.

    Attributes:
      experiment: its name, such as 'ablation'.
      settings: what all runs have in common; the workdir is that of the whole experiment.
      varies: the options in which the runs differ, besides the seed.
      variants: the runs, in their order.
    """

    experiment: str
    settings: Settings
    varies: tuple[str, ...]
    variants: tuple[Variant, ...]

    @property
    def workdir(self) -> pathlib.Path:
        """The folder of the whole experiment."""
        return self.settings.workdir

    @property
    def record(self) -> pathlib.Path:
        """The file that tells of all runs."""
        return self.workdir / f"{self.experiment}.json"

    def settings_of(self, variant: Variant) -> Settings:
        """A variant's settings, with its own workdir."""
        workdir = self.workdir / variant.folder
        return dataclasses.replace(variant.settings, workdir=workdir, boundary_iou=self.settings.boundary_iou)


def run_series(series: Series, report: Callable[[Series, list[dict[str, Any]]], dict[str, Any]]) -> int:
    """Runs what is not over yet, then reports; returns the exit code.

    Args:
      series: the experiment.
      report: called when all runs are over, with their rows; prints and draws, and returns what the record gets more.
    """

    def work(processes: Processes, settings: Settings) -> int | None:
        here = dataclasses.replace(series, settings=settings)
        stopped = run_variants(processes, here)
        if stopped is None and processes.first and not settings.summary:
            rows = list_rows(here)
            write_record(here, report(here, rows))
        return stopped

    return work_together(series.settings, work)


def run_variants(processes: Processes, series: Series) -> int | None:
    """Runs those variants that are not over, one after another, on data that is opened once.

    A run whose loss or parameters are not finite any more is over: that is a result.

    Returns:
      None, or the number of the signal that stopped it.

    Raises:
      As `experiments.run.run_once`, but for that.
    """
    find = _find_once(series.settings)
    if series.settings.summary:
        for variant in {variant.make_decoder: variant for variant in reversed(series.variants)}.values():
            print(f"{variant.title}:")
            run_once(processes, series.settings_of(variant), variant.make_decoder, find)
        return None
    names = [variant.folder for variant in series.variants]
    check_equal(processes, {"settings": to_json(series.settings), "runs": names})
    with processes.share_mistakes():
        if processes.first:
            open_series(series)
    for number, variant in enumerate(series.variants, 1):
        place = f"run {number} of {len(names)}: {variant.title}, seed {variant.settings.seed}"
        settings = series.settings_of(variant)
        if json.loads(processes.from_first(json.dumps(is_over(settings.workdir)))):
            print(f"\n{place}: is over; its folder is {settings.workdir}")
            continue
        print(f"\n{place}", "-" * len(place), sep="\n")
        stopped = _run_to_its_end(processes, settings, variant.make_decoder, find)
        # The programs of a run take 100 MB and more, and nearly all differ from the next one's; those that do not are
        # in the cache on the disk.
        jax.clear_caches()
        if stopped is not None:
            return stopped
        if processes.first:
            write_record(series)
    return None


def _run_to_its_end(processes: Processes, settings: Settings, make_decoder: MakeDecoder, find: FindData) -> int | None:
    """As `run_once`; if the run diverges, that is noted in its folder."""
    try:
        return run_once(processes, settings, make_decoder, find)
    except DivergedError as error:
        print(f"diverged: {error}")
        if processes.first:
            write_json(settings.workdir / "diverged.json", {"step": error.step, "message": str(error)})
        return None


def _find_once(settings: Settings) -> FindData:
    """As `experiments.datasets.find_data`, for runs of one data set: its files are looked at once."""

    @functools.cache
    def find() -> Any:
        labels, open_splits = find_data(settings)
        return labels, functools.cache(open_splits)

    return lambda _: find()


def open_series(series: Series) -> None:
    """Makes the workdir and the record.

    Raises:
      ValueError: the workdir holds something else, or runs of other settings.
    """
    workdir, record = series.workdir, series.record
    check_folder(workdir)
    if record.exists():
        try:
            there = json.loads(record.read_text())["settings"]
            found = differences(there, shared_settings(series))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{record} is damaged ({error!r}): remove it, or give another --workdir") from error
        if found:
            raise ValueError(
                f"--workdir {workdir} holds runs that differ: {'; '.join(found)}. Go on with their options, or give"
                " another --workdir"
            )
    elif workdir.is_dir() and any(workdir.iterdir()):
        raise ValueError(f"--workdir {workdir} is not empty and holds no {record.name}: name another, or empty it")
    for variant in series.variants:
        settings = series.settings_of(variant)
        check_workdir(settings.workdir, {"settings": to_json(settings)})
    workdir.mkdir(parents=True, exist_ok=True)
    write_record(series)


def is_over(workdir: pathlib.Path) -> bool:
    """Whether a run has its results, or diverged."""
    return any((workdir / name).exists() for name in ("results.json", "diverged.json"))


def list_rows(series: Series) -> list[dict[str, Any]]:
    """The rows of the runs that are over, as the record has them; raises Mistake for a damaged file."""
    rows = []
    for variant in series.variants:
        workdir = series.workdir / variant.folder
        if is_over(workdir):
            values = to_json(variant.settings)
            row = {"name": variant.name, "title": variant.title, "seed": variant.settings.seed}
            row |= {"settings": {name: values[name] for name in series.varies}, "run": variant.folder}
            rows.append({**row, **_read_outcome(workdir)})
    return rows


def write_record(series: Series, more: dict[str, Any] | None = None) -> None:
    """Writes what is known of all runs, and `more`."""
    rows = list_rows(series)
    over = {row["run"] for row in rows}
    unfinished = [variant.folder for variant in series.variants if variant.folder not in over]
    record = {"experiment": series.experiment, "settings": shared_settings(series), "rows": rows}
    write_json(series.record, {**record, "unfinished": unfinished, **(more or {})})


def shared_settings(series: Series) -> dict[str, Any]:
    """The options, as JSON, in which no two runs differ, whichever are added later."""
    return {
        name: value
        for name, value in to_json(series.settings).items()
        if name not in ("seed", "workdir", *series.varies)
    }


def _read_outcome(workdir: pathlib.Path) -> dict[str, Any]:
    """What a run that is over came to."""
    outcome: dict[str, Any] = {"checkpoint": None, "val": None, "test": None, "diverged": None}
    outcome["decoder"] = _read_json(workdir / "config.json").get("decoder")
    if (workdir / "results.json").exists():
        results = _read_json(workdir / "results.json")
        outcome["checkpoint"] = results["checkpoint"]
        for split in ("val", "test"):
            if split in results:
                outcome[split] = {name: value for name, value in results[split].items() if name != "confusion"}
    else:
        outcome["diverged"] = _read_json(workdir / "diverged.json")
    return outcome


def _read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise Mistake(f"{path} is damaged ({error}): remove it, or put it back") from error
