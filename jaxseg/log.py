"""What a run writes down while it trains: metrics.csv and TensorBoard events."""

import csv
import pathlib

import numpy as np
from tensorboardX import SummaryWriter

COLUMNS = ("kind", "stage", "epoch", "step", "loss", "learning_rate", "mean_iou", "seconds")


class MetricsLog:
    """Appends rows to `workdir/metrics.csv` and the same numbers to TensorBoard events in `workdir/events`.

    A row of kind 'step' has the loss and the learning rate of one update; one of kind 'epoch' has the mean loss of the
    epoch, the validation mean IoU, each class's IoU (empty where it does not occur), and the epoch's seconds.

    Args:
      workdir: an existing folder.
      num_classes: how many columns `iou_0`, `iou_1`, ... there are.
    """

    def __init__(self, workdir: pathlib.Path, num_classes: int):
        self._file = open(workdir / "metrics.csv", "w", newline="")  # noqa: SIM115 (closed by __exit__)
        columns = [*COLUMNS, *(f"iou_{index}" for index in range(num_classes))]
        self._rows = csv.DictWriter(self._file, columns, restval="")
        self._rows.writeheader()
        self._events = SummaryWriter(str(workdir / "events"))

    def __enter__(self) -> "MetricsLog":
        """Opens nothing more: the files are open since the start."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the files, on an error too."""
        self._file.close()
        self._events.close()

    def step(self, stage: int, epoch: int, step: int, loss: float, learning_rate: float) -> None:
        """Writes one update: its stage and epoch from 1, its global number, its loss in nats."""
        row = {"loss": loss, "learning_rate": learning_rate}
        self._rows.writerow({"kind": "step", "stage": stage, "epoch": epoch, "step": step, **row})
        self._events.add_scalar("train/loss", loss, step)
        self._events.add_scalar("train/learning_rate", learning_rate, step)

    def epoch(
        self, stage: int, epoch: int, step: int, loss: float, mean_iou: float, iou: np.ndarray, seconds: float
    ) -> None:
        """Writes one validated epoch, `iou` (C,) with NaN for absent classes; the file on disk is then complete."""
        row = {"loss": loss, "mean_iou": mean_iou, "seconds": round(seconds, 3)}
        row |= {f"iou_{index}": value for index, value in enumerate(iou.tolist()) if np.isfinite(value)}
        self._rows.writerow({"kind": "epoch", "stage": stage, "epoch": epoch, "step": step, **row})
        self._file.flush()
        self._events.add_scalar("validation/mean_iou", mean_iou, step)
        self._events.add_scalar("train/epoch_loss", loss, step)
        self._events.flush()


def read_metrics(workdir: pathlib.Path, kind: str, stage: int) -> dict[str, np.ndarray]:
    """Reads the rows of one kind and stage back from `workdir/metrics.csv`.

    Returns:
      {'epoch': (n,), 'step': (n,), 'loss': (n,), 'mean_iou': (n,)} float64, NaN where a row has no such number.
    """
    with open(workdir / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == kind and int(row["stage"]) == stage]
    columns = ("epoch", "step", "loss", "mean_iou")
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in columns}
