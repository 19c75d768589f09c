"""Experiments of several runs: which runs they are, that each is made once, and what is told of them."""

import dataclasses
import functools
import json
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import ablation, end_to_end, prepare, series
from experiments.results import markdown_table
from experiments.settings import Options, complete
from experiments.stages import DivergedError
from experiments.stop import Terminated
from jaxseg.decoders import ImprovedDecoder
from tests.peers import small_run


@pytest.fixture
def folder(tmp_path):
    """Four pictures to train on, in one batch."""
    return small_run.write_folder(tmp_path / "data", {"train": 4, "val": 2, "test": 1})


def arguments(folder, workdir, *more):
    options = ["--dataset", f"folder:{folder}", "--num-classes", "2", "--weights", "none", "--image-size", "32", "32"]
    return [*options, "--batch-size", "4", "--epochs", "1", "1", "--workdir", str(workdir), *more]


@pytest.fixture
def pretended(monkeypatch):
    """Runs write results at once, as `outcomes` says by their folder's name: a score, or what they raise or return."""
    outcomes, made = {}, []

    def run_once(processes, settings, make_decoder, find_data):
        made.append(settings.workdir.name)
        outcome = outcomes.get(settings.workdir.name, 0.5)
        settings.workdir.mkdir(exist_ok=True)
        (settings.workdir / "config.json").write_text(json.dumps({"settings": series.to_json(settings)}))
        if isinstance(outcome, BaseException):
            raise outcome
        if isinstance(outcome, signal.Signals):
            return outcome
        split = {"mean_iou": outcome, "iou": {"dark": outcome, "bright": None}, "confusion": [[1]]}
        results = {"checkpoint": {"stage": "stage 2: everything", "epoch": 3}, "val": split, "test": split}
        (settings.workdir / "results.json").write_text(json.dumps(results))
        return None

    monkeypatch.setattr(series, "run_once", run_once)
    return outcomes, made


def test_each_variant_differs_from_the_one_it_is_compared_with_in_one_part():
    parts = {part.name: dataclasses.asdict(part) for part in ablation.PARTS}
    for part in parts.values():
        if part["against"] is None:
            assert not any([part["batch_norm"], part["rotation"], *part["dropout"]]) and part["frozen_stage"]
            continue
        other = parts[part["against"]]
        differing = [name for name in part if part[name] != other[name]]
        assert set(differing[:3]) == {"name", "title", "against"} and len(differing) == 4, part["name"]


def test_the_variants_have_the_same_epochs_and_what_their_parts_say():
    settings = complete(Options(epochs=(3, 4)), "ablation")
    varied = {part.name: ablation.vary(settings, part, 7) for part in ablation.PARTS}
    assert {sum(one.epochs) for one in varied.values()} == {7} and {one.seed for one in varied.values()} == {7}
    assert {name for name, one in varied.items() if one.epochs[0] == 0} == {"no-frozen-stage"}
    assert {name for name, one in varied.items() if not one.max_degrees} == {"baseline", "batch-norm"}
    assert [one.dropout for one in varied.values()] == [(0.0, 0.0)] * 3 + [(0.0, 0.2), (0.2, 0.2), (0.0, 0.2)]
    # The report's improved model is one of them.
    assert dataclasses.replace(varied["dropout"], seed=0) == settings


def test_a_summary_has_means_and_spreads_over_the_seeds_and_gains_seed_by_seed():
    scores = {("baseline", 0): 0.5, ("baseline", 1): 0.7, ("batch-norm", 0): 0.53, ("batch-norm", 1): 0.71}
    rows = [
        {"name": name, "seed": seed, "diverged": None, "val": {"mean_iou": score}, "test": None}
        for (name, seed), score in scores.items()
    ]
    rows += [{"name": "rotation", "seed": seed, "diverged": {"step": 9}, "val": None, "test": None} for seed in (0, 1)]
    rows[-1] = {**rows[-1], "diverged": None, "val": {"mean_iou": 0.8}}
    first, second, third, *others = ablation.summarise(rows)
    assert first["val"]["mean"] == pytest.approx(0.6) and first["val"]["deviation"] == pytest.approx(np.sqrt(0.02))
    assert first["val"]["gain"] is None and first["test"] is None
    assert second["val"]["gain"] == pytest.approx(0.02)
    # The gains are 0.03 and 0.01: their spread is far less than the seeds'.
    assert second["val"]["gain_deviation"] == pytest.approx(np.sqrt(0.0002))
    assert third["diverged"] == [0] and third["val"]["gain"] == pytest.approx(0.09)
    assert third["val"]["deviation"] is None is third["val"]["gain_deviation"]
    assert [entry["val"] for entry in others] == [None] * 3 and others[0]["seeds"] == []


def test_an_ablation_tells_of_all_runs_and_makes_none_twice(folder, tmp_path, capsys, pretended):
    outcomes, made = pretended
    workdir = tmp_path / "all"
    outcomes |= {"batch-norm-seed-0": 0.625, "rotation-seed-0": DivergedError("the loss is nan", 17)}
    assert ablation.main(arguments(folder, workdir)) == 0
    assert made == [f"{part.name}-seed-0" for part in ablation.PARTS]
    out = capsys.readouterr().out
    assert "run 2 of 6: + batch norm, seed 0" in out and "diverged: the loss is nan" in out
    table = (workdir / "ablation.md").read_text()
    assert table in out
    record = json.loads((workdir / "ablation.json").read_text())
    assert record["unfinished"] == [] and record["settings"]["batch_size"] == 4
    assert [(workdir / path).exists() for path in (record["table"], *record["figures"])] == [True, True]
    assert [row["run"] for row in record["rows"]] == made
    batch_norm, rotation = record["rows"][1:3]
    assert batch_norm["val"] == {"mean_iou": 0.625, "iou": {"dark": 0.625, "bright": None}} == batch_norm["test"]
    assert batch_norm["settings"] == {"max_degrees": 0.0, "dropout": [0.0, 0.0], "epochs": [1, 1]}
    assert rotation["val"] is None and rotation["diverged"] == {"step": 17, "message": "the loss is nan"}
    cells = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()]
    assert ["", "+ batch norm", "baseline", "0.6250", "+0.1250", "0.6250", "+0.1250", ""] in cells
    assert ["", "+ rotation", "+ batch norm", "diverged", "", "diverged", "", ""] in cells
    # Once more, and with another seed: only what is new is run.
    made.clear()
    assert ablation.main(arguments(folder, workdir, "--seeds", "0", "3")) == 0
    assert made == [f"{part.name}-seed-3" for part in ablation.PARTS]
    assert " 0.5625 ± 0.0884 | +0.0625 ± 0.0884 |" in (workdir / "ablation.md").read_text()


def test_a_signal_stops_all_and_the_rest_is_made_later(folder, tmp_path, capsys, pretended):
    outcomes, made = pretended
    workdir = tmp_path / "all"
    for stopped in (signal.SIGTERM, Terminated()):
        outcomes["batch-norm-seed-0"] = stopped
        made.clear()
        assert ablation.main(arguments(folder, workdir)) == 143
        assert made[-1] == "batch-norm-seed-0"
        record = json.loads((workdir / "ablation.json").read_text())
        assert [row["name"] for row in record["rows"]] == ["baseline"] and len(record["unfinished"]) == 5
        assert "figures" not in record
    (workdir / "baseline-seed-0" / "checkpoints" / "1").mkdir(parents=True)
    assert ablation.main(arguments(folder, workdir)) == 143
    assert f"the same command with --workdir {workdir} goes on" in capsys.readouterr().err
    del outcomes["batch-norm-seed-0"]
    made.clear()
    assert ablation.main(arguments(folder, workdir)) == 0 and len(made) == 5


def test_a_workdir_of_something_else_is_refused(folder, tmp_path, capsys, pretended):
    _, made = pretended
    assert ablation.main(arguments(folder, folder)) == 2
    assert "is not empty and holds no ablation.json" in capsys.readouterr().err
    assert ablation.main(arguments(folder, folder / "classes.txt" / "all")) == 0
    made.clear()
    workdir = folder / "classes.txt" / "all"
    assert ablation.main(arguments(folder, workdir, "--seeds", "1", "--adam-b2", "0.9")) == 2
    assert "--adam-b2 0.999 there, 0.9 here" in capsys.readouterr().err
    # What the variants differ in is compared run by run.
    assert ablation.main(arguments(folder, workdir, "--max-degrees", "10")) == 2
    assert "--max-degrees 30.0 there, 10.0 here" in capsys.readouterr().err
    (workdir / "ablation.json").write_text("{")
    assert ablation.main(arguments(folder, workdir)) == 2
    assert "ablation.json is damaged" in capsys.readouterr().err
    assert made == []


@pytest.mark.parametrize(
    ("experiment", "options", "said"),
    [
        (ablation, ["--seeds", "1", "1"], "--seeds 1 1: each one once"),
        (ablation, ["--seeds", "-1"], "--seeds must be from 0"),
        (ablation, ["--max-degrees", "0"], "--max-degrees 0"),
        (ablation, ["--dropout", "0.1", "0.2"], "--dropout 0.1 0.2"),
        (ablation, ["--dropout", "0", "0"], "--dropout 0.0 0.0"),
        (ablation, ["--epochs", "0", "3"], "needs both stages"),
        (ablation, ["--batch-size", "0"], "--batch-size"),
        (end_to_end, ["--learning-rate", "1", "1"], "give --learning-rates"),
        (end_to_end, ["--learning-rates", "1", "0"], "--learning-rates must be above 0"),
        (end_to_end, ["--learning-rates", "1e-3", "0.001"], "each once"),
    ],
)
def test_impossible_options_are_refused_at_once(capsys, experiment, options, said):
    assert experiment.main(options) == 2
    assert said in capsys.readouterr().err


def test_learning_rates_that_diverge_are_a_result_and_the_data_is_looked_at_once(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("experiments.run.draw", lambda *_: None)
    monkeypatch.setattr("jaxseg.train.all_devices", lambda: jax.devices()[:1])
    monkeypatch.setattr(prepare, "ResNet", small_run.SmallEncoder)
    monkeypatch.setattr(prepare, "ImprovedDecoder", functools.partial(ImprovedDecoder, widths=(8, 8, 8, 8, 8)))
    looked = []
    find_data = series.find_data
    monkeypatch.setattr(series, "find_data", lambda settings: looked.append(settings) or find_data(settings))
    workdir = tmp_path / "all"
    argv = arguments(folder, workdir, "--epochs", "1", "2", "--learning-rates", "1e30", "1e-3")
    assert end_to_end.main(argv) == 0
    assert len(looked) == 1
    record = json.loads((workdir / "end_to_end.json").read_text())
    diverged, other = record["rows"]
    assert diverged["val"] is None and diverged["diverged"]["step"] in (2, 3)
    assert "learning rate 1e+30" in diverged["diverged"]["message"]
    assert other["diverged"] is None and other["decoder"] == "ImprovedDecoder"
    results = json.loads((workdir / other["run"] / "results.json").read_text())
    assert {split: results[split]["mean_iou"] for split in ("val", "test")} == {
        split: other[split]["mean_iou"] for split in ("val", "test")
    }
    assert other["settings"] == {"learning_rate": [1e-3, 1e-3]} and record["settings"]["epochs"] == [0, 3]
    assert "learning_rate" not in record["settings"]
    assert all((workdir / path).stat().st_size > 10_000 for path in record["figures"])
    assert f"diverged at step {diverged['diverged']['step']}" in (workdir / "end_to_end.md").read_text()
    curve = end_to_end.read_curve(workdir, other)
    np.testing.assert_array_equal(curve.stage.epochs, [1, 2, 3])
    assert len(curve.stage.losses) == 3 and not curve.ended and end_to_end.read_curve(workdir, diverged).ended
    # Both are over, the diverged one too.
    monkeypatch.setattr(series, "run_once", lambda *_: pytest.fail("a run is made twice"))
    assert end_to_end.main(argv) == 0
    assert capsys.readouterr().out.count("is over") == 2


def test_help_comes_without_jax():
    code = """if True:
        import sys
        from experiments import ablation, compare, end_to_end
        for experiment, option in ((ablation, "seeds"), (compare, "RUN_B"), (end_to_end, "learning-rates")):
            try: experiment.main(["--help"])
            except SystemExit: print(option, "jax" in sys.modules)
    """
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for option in ("seeds", "RUN_B", "learning-rates"):
        assert f"{option} False" in out and out.count(option) >= 2
    assert "shapes: --image-size" in out and "about half a gigabyte" in " ".join(out.split())


def test_a_table_can_be_read_as_it_is():
    table = markdown_table(["run", "mIoU"], [["a", "0.5"], ["long name", "0.25"]])
    assert table.splitlines() == [
        "| run       | mIoU |",
        "| --------- | ---: |",
        "| a         |  0.5 |",
        "| long name | 0.25 |",
    ]
