"""Two processes of two devices each are one of four, whatever stops them; each says what goes wrong."""

import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments import prepare
from experiments.processes import ALONE, Agreement
from experiments.settings import parse
from jaxseg import train
from tests.peers import small_run
from tests.peers.small_run import last_state, rows

DEADLINE = 300  # seconds, for a process to come as far as it is waited for
TOGETHER = ("--coordinator", "--num-processes", "--process-id")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eighty pictures to train on, ten updates an epoch, the later ones ignored in part; five to validate on."""
    root = tmp_path_factory.mktemp("distributed") / "data"
    return small_run.write_folder(root, {"train": 80, "val": 5, "test": 2}, ignored=lambda index: index / 80)


def arguments(folder, workdir):
    options = ["--dataset", f"folder:{folder}", "--num-classes", "2", "--weights", "none", "--image-size", "64", "64"]
    options += ["--batch-size", "8", "--epochs", "2", "2", "--learning-rate", "3e-5", "3e-5"]
    return [*options, "--workdir", str(workdir)]


def start(module, argvs):
    """Starts a process for each list of arguments, with four devices in all."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    number = len(argvs)
    flags = os.environ["XLA_FLAGS"].replace("device_count=4", f"device_count={4 // number}")
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    processes = []
    for index, argv in enumerate(argvs):
        together = zip(TOGETHER, (coordinator, str(number), str(index)), strict=True) if number > 1 else ()
        command = [sys.executable, "-m", module, *argv, *itertools.chain(*together)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment, **pipes))
    return processes


def finish(processes):
    """Waits for all; returns their exit codes, what they printed and what they said on the standard error."""
    try:
        said = [process.communicate(timeout=DEADLINE) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], *map(list, zip(*said, strict=True))


def stop_when(argv, come, who, number):
    """Starts both, sends one of them a signal a random moment after `come()`; returns as `finish`."""
    processes = start("tests.peers.small_run", [argv, argv])
    deadline = time.monotonic() + DEADLINE
    while not come():
        if any(process.poll() is not None for process in processes) or time.monotonic() > deadline:
            pytest.fail(f"they ended before, or never came so far: {finish(processes)}")
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.05))
    processes[who].send_signal(number)
    return finish(processes)


def test_two_processes_are_one_of_four_devices_and_go_on_after_one_is_killed(folder, tmp_path, monkeypatch):
    whole, together = tmp_path / "whole", tmp_path / "together"
    monkeypatch.setattr(prepare, "ResNet", small_run.SmallEncoder)
    assert len(jax.devices()) == 4 and small_run.main(arguments(folder, whole)) == 0
    argv = arguments(folder, together)
    # A signal to one stops both, after the same update.
    codes, _, said = stop_when(argv, lambda: len(rows(together)) > 6, random.randrange(2), signal.SIGTERM)
    assert codes == [128 + signal.SIGTERM] * 2, said
    assert "stopped, and saved" in said[0] and "stopped, and saved" not in said[1]
    # One is killed in the second stage: the other notices and ends too.
    killed = random.randrange(2)
    codes, printed, said = stop_when(argv, lambda: len(rows(together)) > 28, killed, signal.SIGKILL)
    assert codes[killed] == -signal.SIGKILL and codes[1 - killed] in (1, -signal.SIGABRT), said
    assert "another process of the run has ended" in said[1 - killed] or "another task died" in said[1 - killed]
    assert ("devices: 4 cpu in 2 processes" in printed[0] and "going on after" in printed[0]) or not killed
    assert "devices" not in printed[1]
    # What is written, the first one says.
    codes, printed, said = finish(start("tests.peers.small_run", [[*argv, "--boundary-iou"], argv]))
    assert codes == [0, 0], said
    assert "going on after" in printed[0] and printed[0].count("mean_boundary_iou: ") == 2

    assert [row["step"] for row in rows(together)] == [row["step"] for row in rows(whole)]
    losses = [[float(row["loss"]) for row in rows(workdir)] for workdir in (together, whole)]
    np.testing.assert_allclose(*losses, rtol=1e-5, atol=1e-5)
    states = [last_state(workdir) for workdir in (together, whole)]
    assert [int(state.step) for state in states] == [40, 40]

    def close(path, value, expected):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5, err_msg=jax.tree_util.keystr(path))

    jax.tree.map_with_path(close, *((state.params, state.batch_stats) for state in states))
    for split in ("val", "test"):
        results = [json.loads((workdir / "results.json").read_text())[split] for workdir in (together, whole)]
        one, other = (np.array(result["confusion"]) for result in results)
        assert one.sum() == other.sum() and np.abs(one - other).sum() / 2 <= 1e-5 * one.sum()
    figures = [{path.name for path in (workdir / "figures").iterdir()} for workdir in (together, whole)]
    assert figures[0] == figures[1]


def test_processes_that_differ_are_refused_by_all(folder, tmp_path):
    argvs = [[*arguments(folder, tmp_path / name), "--seed", seed] for name, seed in (("a", "0"), ("b", "1"))]
    codes, _, said = finish(start("experiments.baseline", argvs))
    assert codes == [2, 2], said
    for text in said:
        assert "error: process 0 (there) and process 1 (here) differ: --seed 0 there, 1 here\n" in text
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--coordinator", "here:1234"], "--num-processes, --process-id missing"),
        (["--process-id", "0"], "--coordinator, --num-processes missing"),
        (["--coordinator", "1234", "--num-processes", "2", "--process-id", "0"], "must be HOST:PORT"),
        (["--coordinator", "here:99999", "--num-processes", "2", "--process-id", "0"], "must be HOST:PORT"),
        (["--coordinator", "here:1", "--num-processes", "2", "--process-id", "2"], "--process-id 2: must be from 0"),
        (["--coordinator", "here:1", "--num-processes", "1", "--process-id", "-1"], "--process-id -1"),
        (["--coordinator", "here:1", "--num-processes", "1", "--process-id", "0", "--distributed"], "one of the two"),
        (["--distributed", "--debug-nans"], "--debug-nans works in one process"),
    ],
)
def test_processes_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match="--") as error:
        parse("improved", "", options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_no_cluster_is_one_line_and_asks_nobody(folder, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMPI"))}
    command = [sys.executable, "-m", "experiments.baseline", *arguments(folder, tmp_path / "run"), "--distributed"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "--distributed: JAX finds no SLURM, Open MPI or GKE" in done.stderr


def test_one_process_alone_hears_itself_and_waits_for_nobody():
    tree = {"a": np.arange(3)}
    assert ALONE.gather("a word") == ["a word"] and ALONE.from_first("") == ""
    assert ALONE.arrays_from_first(tree) is tree
    assert ALONE.part == (0, 1) and ALONE.leave(3) == 3
    ALONE.wait_for_all()
    with pytest.raises(OSError, match="its own"), ALONE.share_mistakes():
        raise OSError("its own")


def test_an_agreement_is_known_some_calls_later_and_only_once():
    agreement = Agreement(jax.local_devices())
    assert [agreement.late(number) for number in (0, 15, 1, 0, 0, 0)] == [0] * train.LAG + [0, 15, 1, 0]
    agreement.late(15)
    assert agreement.now(2) == 2
    assert [agreement.late(0) for _ in range(4)] == [0] * 4
