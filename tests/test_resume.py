"""A run that is stopped ends where it would have ended."""

import errno
import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments import baseline, prepare, stages
from experiments.settings import Options, complete, to_json
from jaxseg import checkpoint, train
from jaxseg.data import loader
from jaxseg.data.folder import open_folder
from tests.peers import small_run
from tests.peers.small_run import last_state

DEADLINE = 300  # seconds, for a process to come as far as it is waited for


@pytest.fixture
def folder(tmp_path):
    """Eight pictures to train on, two updates an epoch, and three to validate on."""
    return small_run.write_folder(tmp_path / "data", {"train": 8, "val": 3})


def arguments(folder, workdir, *more):
    options = ["--dataset", f"folder:{folder}", "--num-classes", "2", "--weights", "none", "--image-size", "32", "32"]
    return [*options, "--batch-size", "4", "--epochs", "2", "2", "--max-degrees", "0", "--workdir", str(workdir), *more]


def stop_when(argv, come, number):
    """Starts the command, sends it a signal a random moment after `come()`; returns its exit code and what it said."""
    command = [sys.executable, "-m", "tests.peers.small_run", *argv]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + DEADLINE
        while not come():
            assert process.poll() is None, f"it ended before: {process.stderr.read()}"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.05))
        process.send_signal(number)
        _, said = process.communicate(timeout=DEADLINE)
    return process.returncode, said


def rows(workdir):
    """The rows of metrics.csv, without the time that they took."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in small_run.rows(workdir)]


def ends_alike(stopped, whole, updates):
    """Both runs have the same rows, results, figures and, after so many updates, the same state to the bit."""
    assert rows(stopped) == rows(whole)
    assert (stopped / "results.json").read_text() == (whole / "results.json").read_text()
    state, other = last_state(stopped), last_state(whole)
    assert int(state.step) == updates
    jax.tree.map(np.testing.assert_array_equal, state, other)
    figures = {path.name for path in (stopped / "figures").iterdir()}
    assert figures == {path.name for path in (whole / "figures").iterdir()}


def test_a_run_that_keeps_features_and_drops_is_killed_and_ends_bit_equal(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "ResNet", small_run.SmallEncoder)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert small_run.main(arguments(folder, whole)) == 0

    def numbers():
        return [int(path.name) for path in (stopped / "checkpoints").glob("*") if path.name.isdigit()]

    def has(kind, stage, epoch):
        return any((row["kind"], row["stage"], row["epoch"]) == (kind, stage, epoch) for row in rows(stopped))

    def writing():
        return any("tmp" in path.name for path in (stopped / "checkpoints").glob("*"))

    # With a checkpoint after each update, or only where it is asked for.
    often, seldom = arguments(folder, stopped, "--save-minutes", "1e-9"), arguments(folder, stopped)
    asked = random.choice([signal.SIGINT, signal.SIGTERM])
    code, said = stop_when(seldom, lambda: (stopped / "metrics.csv").exists(), asked)
    assert code == 128 + asked and f"--workdir {stopped} goes on" in said
    # It was computing features, or made one update more.
    assert numbers() == [1] and len(rows(stopped)) <= 1
    # In the first stage, between the stages while a checkpoint is written, and in the second stage.
    for come in (
        lambda: has("step", "1", "2"),
        lambda: has("epoch", "1", "2") and writing(),
        lambda: has("step", "2", "1"),
    ):
        assert stop_when(often, come, signal.SIGKILL)[0] == -signal.SIGKILL
    # One number of the last checkpoint changes: the run goes on from the one before.
    damaged = stopped / "checkpoints" / str(max(numbers()))
    # A later one that a crash left half written, without its description, is not taken for one; no number of this run.
    half = damaged.with_name("99.orbax-checkpoint-tmp")
    shutil.copytree(damaged, half, ignore=shutil.ignore_patterns("meta", "_CHECKPOINT*", "commit*"))
    largest = max((damaged / "model").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert small_run.main(seldom) == 0
    assert damaged.with_name(f"damaged-{damaged.name}").is_dir() and not writing()

    ends_alike(stopped, whole, updates=8)


def test_one_that_rotates_and_drops_is_killed_and_ends_bit_equal(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "ResNet", small_run.SmallEncoder)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    options = ["--max-degrees", "30", "--epochs", "1", "2", "--encoder-rate", "0.1"]
    assert small_run.main([*arguments(folder, whole), *options]) == 0
    options += ["--save-minutes", "1e-9"]
    code, _ = stop_when([*arguments(folder, stopped), *options], lambda: len(rows(stopped)) > 6, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert small_run.main([*arguments(folder, stopped), *options]) == 0
    ends_alike(stopped, whole, updates=6)


def test_a_loss_that_is_not_finite_is_explained_and_what_was_saved_before_is_kept(
    folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(prepare, "ResNet", small_run.SmallEncoder)
    argv = [*arguments(folder, tmp_path / "run"), "--learning-rate", "1e-3", "1e30"]
    assert small_run.main(argv) == 1
    (said,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    # The fifth update has finite numbers still, and what it leaves has not.
    assert "the loss is nan at step 6 (stage 2: everything, learning rate 1e+30; images " in said
    assert f"the checkpoints in {tmp_path / 'run'} are from before it" in said
    assert small_run.main([*arguments(folder, tmp_path / "first"), "--learning-rate", "1e30", "1e30"]) == 1
    assert "nothing was saved before it" in capsys.readouterr().err
    state = last_state(tmp_path / "run")
    assert int(state.step) == 4 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    # The images of the second batch of that stage, by name.
    source = open_folder(folder, 2)[1]["train"]
    batches = loader.train_batches(source, image_size=(32, 32), batch_size=4, seed=2)
    *_, batch = itertools.islice(batches, 2)
    assert said.partition("; images ")[2].partition(")")[0] == ", ".join(source[i]["name"] for i in batch["index"])
    with pytest.raises(FloatingPointError, match=r"invalid value \(nan\) encountered in"):
        small_run.main([*argv, "--debug-nans"])
    with pytest.raises(FloatingPointError, match=r"invalid value \(nan\) encountered in"):
        small_run.main([*argv, "--debug-nans"])


def test_a_disk_that_fills_up_ends_a_run_which_goes_on_when_there_is_room(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "ResNet", small_run.SmallEncoder)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert small_run.main(arguments(folder, whole)) == 0
    calls, check_space = [], checkpoint._check_space

    def fill_up(*arguments):
        calls.append(arguments)
        if len(calls) == 3:  # in the second stage
            raise OSError(errno.ENOSPC, "No space left on device")
        check_space(*arguments)

    monkeypatch.setattr(checkpoint, "_check_space", fill_up)
    assert small_run.main(arguments(folder, stopped)) == 1
    (said,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert f"No space left on device; the same command with --workdir {stopped} goes on" in said
    assert small_run.main(arguments(folder, stopped)) == 0
    ends_alike(stopped, whole, updates=8)


def test_where_all_checkpoints_are_damaged_nothing_begins_anew(tmp_path, monkeypatch, capsys):
    state = train.TrainState(np.int32(1), {"kernel": np.arange(6.0)}, {}, {})
    monkeypatch.setattr(stages, "_first_state", lambda run, number: state)
    progress = {"progress": {"stage": 1}}
    with checkpoint.open_checkpoints(tmp_path) as manager:
        assert stages.resume(None, manager) is None
        for _ in range(2):
            checkpoint.save(manager, state, None, progress)
        assert stages.resume(None, manager)[1] == stages.Progress(1)
    for path in tmp_path.glob("*/meta/metadata"):
        path.write_text("{}")
    for damaged in (2, 0):
        opened = checkpoint.open_checkpoints(tmp_path)
        with opened as manager, pytest.raises(ValueError, match="another --workdir"):
            stages.resume(None, manager)
        assert capsys.readouterr().err.count("now called damaged-") == damaged


def test_a_workdir_of_other_settings_is_refused_with_the_differences(folder, tmp_path, capsys):
    workdir = tmp_path / "run"
    settings = Options(dataset=f"folder:{folder}", weights="none", num_classes=2, workdir=workdir)
    settings = complete(settings, "baseline")
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps({"settings": to_json(settings), "names": [], "images": {}}))
    argv = ["--dataset", f"folder:{folder}", "--weights", "none", "--num-classes", "2", "--workdir", str(workdir)]
    assert baseline.main([*argv, "--seed", "3", "--batch-size", "4", "--boundary-iou"]) == 2
    said = capsys.readouterr().err
    assert "boundary" not in said  # a run may go on with it
    assert "--batch-size 8 there, 4 here; --seed 0 there, 3 here" in said and len(said.splitlines()) == 1
    (workdir / "config.json").write_text("{")
    assert baseline.main(argv) == 2
    assert "config.json is damaged" in capsys.readouterr().err
