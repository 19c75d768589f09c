"""What a run writes down while it trains: metrics.csv and TensorBoard events."""

import contextlib
import csv
import io
import itertools
import os
import pathlib
import socket
import sys
import time
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

# Where PyTorch is installed tensorboardX imports it, which takes seconds, and what is written here needs none of it:
# a module of None cannot be imported.
_hidden = "torch" not in sys.modules and sys.modules.setdefault("torch", None) is None  # type: ignore[arg-type]
from tensorboardX.proto import event_pb2, summary_pb2  # noqa: E402
from tensorboardX.record_writer import RecordWriter  # noqa: E402

from jaxseg.files import replacing  # noqa: E402

if _hidden:
    del sys.modules["torch"]

COLUMNS = ("kind", "stage", "epoch", "step", "loss", "learning_rate", "mean_iou", "seconds")


class MetricsLog:
    """Appends rows to `workdir/metrics.csv` and the same numbers to TensorBoard events in `workdir/events`.

    A row of kind 'step' has the loss and the decoder's learning rate of one update; one of kind 'epoch' has the mean
    loss of the epoch, the validation mean IoU, each class's IoU (empty where it does not occur), and the epoch's
    seconds.

    Args:
      workdir: an existing folder.
      num_classes: how many columns `iou_0`, `iou_1`, ... there are.
      rows: how many rows to keep of a run that goes on; those after them are dropped.
      step: the updates that those rows tell of.
      checksum: that of those rows, from `checksum`; None if nobody knows it.

    Raises:
      ValueError: there are fewer rows, or others.
      OSError: a file cannot be written; it is named.

    Attributes:
      rows: how many rows there are.
      checksum: CRC-32 of the lines so far.
    """

    def __init__(
        self, workdir: pathlib.Path, num_classes: int, rows: int = 0, step: int = 0, checksum: int | None = None
    ):
        columns = [*COLUMNS, *(f"iou_{index}" for index in range(num_classes))]
        self._path = path = workdir / "metrics.csv"
        text = "".join(_first_lines(path, 1 + rows)) if rows else ",".join(columns) + "\r\n"
        self.rows, self.checksum = rows, zlib.crc32(text.encode())
        if rows and checksum not in (None, self.checksum):
            raise ValueError(f"{path} was changed after the checkpoint was saved: put it back")
        with replacing(path) as new:
            new.write_text(text, newline="")
        self._file = open(path, "a", newline="")  # noqa: SIM115 (closed by __exit__)
        self._line = io.StringIO()
        self._rows = csv.DictWriter(self._line, columns, restval="")
        self._events = _Events(workdir / "events", step + 1)

    def __enter__(self) -> "MetricsLog":
        """Opens nothing more: the files are open since the start."""
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        """Closes the files; of an error that is under way already, theirs may be but a consequence."""
        with contextlib.ExitStack() as stack:
            if kind:
                stack.enter_context(contextlib.suppress(OSError))
            stack.callback(self._events.close)
            with _named(self._path):
                self._file.close()

    def step(self, stage: int, epoch: int, step: int, loss: float, learning_rate: float) -> None:
        """Writes one update: its stage and epoch from 1, its global number, its loss in nats."""
        row = {"loss": loss, "learning_rate": learning_rate}
        self._write({"kind": "step", "stage": stage, "epoch": epoch, "step": step, **row})
        self._events.write(step, {"train/loss": loss, "train/learning_rate": learning_rate})

    def epoch(
        self, stage: int, epoch: int, step: int, loss: float, mean_iou: float, iou: np.ndarray, seconds: float
    ) -> None:
        """Writes one validated epoch, `iou` (C,) with NaN for absent classes."""
        row = {"loss": loss, "mean_iou": mean_iou, "seconds": round(seconds, 3)}
        row |= {f"iou_{index}": value for index, value in enumerate(iou.tolist()) if np.isfinite(value)}
        self._write({"kind": "epoch", "stage": stage, "epoch": epoch, "step": step, **row})
        self._events.write(step, {"validation/mean_iou": mean_iou, "train/epoch_loss": loss})

    def flush(self) -> None:
        """Returns when all rows are on the disk; called before each checkpoint, which counts on them."""
        with _named(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
        self._events.flush()

    def _write(self, row: dict[str, object]) -> None:
        self._rows.writerow(row)
        line = self._line.getvalue()
        self._line.seek(0)
        self._line.truncate()
        with _named(self._path):
            self._file.write(line)
        self.rows, self.checksum = self.rows + 1, zlib.crc32(line.encode(), self.checksum)


class _Events:
    """A new file of TensorBoard's, in a folder that is made.

    tensorboardX's own writer hands events to a thread, and waits for ever where that has met a full disk.

    Args:
      folder: where.
      first: TensorBoard is told to forget what earlier files say of this step and those after it.
    """

    def __init__(self, folder: pathlib.Path, first: int):
        folder.mkdir(exist_ok=True)
        self._path = folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        with _named(self._path):
            self._file = RecordWriter(str(self._path.absolute()))
            self._write(file_version="brain.Event:2")
            self._write(step=first, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Writes numbers under their names."""
        values = [summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        with _named(self._path):
            self._write(step=step, summary=summary_pb2.Summary(value=values))

    def flush(self) -> None:
        with _named(self._path):
            self._file.flush()

    def close(self) -> None:
        with _named(self._path):
            self._file.close()

    def _write(self, **fields: Any) -> None:
        self._file.write(event_pb2.Event(wall_time=time.time(), **fields).SerializeToString())


@contextlib.contextmanager
def _named(path: pathlib.Path) -> Iterator[None]:
    """Of an OSError within it says which file cannot be written."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot be written ({error.strerror})", str(path)) from error


def _first_lines(path: pathlib.Path, number: int) -> list[str]:
    """Reads so many lines; raises ValueError if there are fewer."""
    lines = []
    if path.is_file():
        with open(path, newline="", errors="replace") as file:
            lines = [line.rstrip("\r\n") + "\r\n" for line in itertools.islice(file, number)]
    if len(lines) < number:
        raise ValueError(f"{path}: the checkpoint counts on {number} lines, and there are {len(lines)}: put them back")
    return lines


def read_metrics(workdir: pathlib.Path, kind: str, stage: int) -> dict[str, np.ndarray]:
    """Reads the rows of one kind and stage back from `workdir/metrics.csv`.

    Returns:
      {'epoch': (n,), 'step': (n,), 'loss': (n,), 'mean_iou': (n,)} float64, NaN where a row has no such number.
    """
    with open(workdir / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == kind and int(row["stage"]) == stage]
    columns = ("epoch", "step", "loss", "mean_iou")
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in columns}
