"""What is written while training can be read back."""

import csv
import resource
import struct
import subprocess
import sys

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from jaxseg.log import MetricsLog, read_metrics


@pytest.fixture
def small_files():
    """A function that says how many bytes a file may have from now on, which the operating system sees to."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_a_run(workdir):
    with MetricsLog(workdir, 3) as log:
        log.step(1, 1, 1, 2.5, 1e-3)
        log.step(1, 1, 2, 1.5, 1e-3)
        log.epoch(1, 1, 2, 2.0, 0.25, np.array([0.5, 0.0, np.nan]), 1.25)
        log.step(2, 1, 3, 0.5, 3e-4)


def test_rows_are_complete(tmp_path):
    write_a_run(tmp_path)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [row["kind"] for row in rows] == ["step", "step", "epoch", "step"]
    assert rows[2]["iou_0"] == "0.5" and rows[2]["iou_1"] == "0.0" and rows[2]["iou_2"] == ""
    assert float(rows[3]["learning_rate"]) == 3e-4


def test_read_metrics_separates_stages_and_kinds(tmp_path):
    write_a_run(tmp_path)
    steps = read_metrics(tmp_path, "step", 1)
    np.testing.assert_array_equal(steps["loss"], [2.5, 1.5])
    epochs = read_metrics(tmp_path, "epoch", 1)
    np.testing.assert_array_equal(epochs["mean_iou"], [0.25])
    assert len(read_metrics(tmp_path, "epoch", 2)["step"]) == 0


def test_a_run_that_goes_on_drops_the_rows_after_its_checkpoint(tmp_path):
    write_a_run(tmp_path)
    whole = (tmp_path / "metrics.csv").read_text()
    # The checkpoint was written after the epoch: the step after it is made again.
    with MetricsLog(tmp_path, 3, rows=3, step=2) as log:
        assert log.rows == 3
        log.step(2, 1, 3, 0.5, 3e-4)
        assert log.rows == 4
    assert (tmp_path / "metrics.csv").read_text() == whole
    with MetricsLog(tmp_path, 3):
        pass
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 1


def test_a_log_that_lost_rows_is_refused(tmp_path):
    write_a_run(tmp_path)
    path = tmp_path / "metrics.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match="counts on 5 lines"):
        MetricsLog(tmp_path, 3, rows=4, step=3)


def checksum_of_a_run(workdir):
    with MetricsLog(workdir, 3) as log:
        log.step(1, 1, 1, 2.5, 1e-3)
        log.step(1, 1, 2, 1.5, 1e-3)
        return log.checksum


@pytest.mark.parametrize(
    "edit",
    [
        lambda lines: [*lines[:2], lines[1], *lines[2:]],
        lambda lines: [*lines[:1], "hello world\r\n", *lines[2:]],
        lambda lines: [lines[0].replace("loss", "lose"), *lines[1:]],
        lambda lines: [*lines[:2], lines[2][:-5]],
    ],
)
def test_a_log_that_was_edited_is_refused(tmp_path, edit):
    checksum, path = checksum_of_a_run(tmp_path), tmp_path / "metrics.csv"
    with open(path, newline="") as file:
        lines = file.readlines()
    path.write_text("".join(edit(lines)), newline="")
    with pytest.raises(ValueError, match="was changed"):
        MetricsLog(tmp_path, 3, rows=2, step=2, checksum=checksum)


def test_ends_of_lines_may_change_and_the_checksum_goes_on(tmp_path):
    checksum, path = checksum_of_a_run(tmp_path), tmp_path / "metrics.csv"
    path.write_text(path.read_text().replace("\r\n", "\n").rstrip("\n"), newline="")
    with MetricsLog(tmp_path, 3, rows=2, step=2, checksum=checksum) as log:
        assert log.checksum == checksum
        log.step(1, 2, 3, 1.25, 1e-3)
        further = log.checksum
    assert further != checksum
    with MetricsLog(tmp_path, 3, rows=3, step=3, checksum=further):
        pass


def test_flushed_rows_are_on_the_disk(tmp_path):
    with MetricsLog(tmp_path, 3) as log:
        log.step(1, 1, 1, 2.5, 1e-3)
        log.flush()
        assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize(("number", "named"), [(40, "metrics.csv"), (2000, "events.out.tfevents.")])
def test_a_disk_that_is_full_is_an_error_that_names_the_file(tmp_path, small_files, number, named):
    """And neither waits for ever nor hides behind what closing the files says."""
    with (
        pytest.raises(OSError, match=r"cannot be written \(File too large\)") as caught,
        MetricsLog(tmp_path, 3) as log,
    ):
        small_files(1000)
        for step in range(number):
            log.step(1, 1, step, 2.5, 1e-3)
        log.flush()
    assert named in caught.value.filename


def test_what_cannot_be_written_is_known_at_the_end_at_the_latest(tmp_path, small_files):
    with pytest.raises(OSError, match=r"cannot be written \(File too large\)"), MetricsLog(tmp_path, 3) as log:
        small_files(1000)
        for step in range(40):
            log.step(1, 1, step, 2.5, 1e-3)


def test_tensorboard_gets_the_same_numbers(tmp_path):
    write_a_run(tmp_path)
    (path,) = (tmp_path / "events").iterdir()
    data, offset, scalars, forgets = path.read_bytes(), 0, [], []
    while offset < len(data):
        # A record: its length (8 bytes), the length's checksum (4), the event, the event's checksum (4).
        (length,) = struct.unpack_from("<Q", data, offset)
        event = event_pb2.Event.FromString(data[offset + 12 : offset + 12 + length])
        scalars += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        forgets += [event.step] if event.session_log.status == event_pb2.SessionLog.START else []
        offset += length + 16
    assert ("train/loss", 2, 1.5) in scalars
    assert ("validation/mean_iou", 2, 0.25) in scalars
    # What earlier files of the same run say of these steps is void.
    assert forgets == [1]


def test_the_events_do_not_import_pytorch():
    code = "import sys, jaxseg.log, tensorboardX; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys; sys.modules['torch'] = there = type(sys)('torch'); there.Tensor = int; import jaxseg.log"
    code += "; assert sys.modules['torch'] is there"
    subprocess.run([sys.executable, "-c", code], check=True)
