"""Training stage after stage, with all that lets a run that was stopped go on where it was."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

from experiments.features import compute_features
from experiments.prepare import Run
from experiments.results import print_table, stage_difference
from experiments.stop import Stop
from jaxseg import checkpoint, metrics, optimizer, train
from jaxseg.data import loader
from jaxseg.log import MetricsLog, read_metrics

# How many images a message names.
_SHOWN = 64


class DivergedError(FloatingPointError):
    """The loss or a parameter is not finite: what a person can do, and `step`, the update after which it was seen."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands: what its checkpoints hold besides the state.

    Attributes:
      stage: the number of the stage that goes on, 1 or 2.
      epoch: the epoch of it that goes on, from 1; one more than the stage has when it is over.
      updates: how many of that epoch's updates are made.
      seconds: spent on that epoch.
      rows: in metrics.csv.
      checksum: of those rows; None where an older version saved it.
      last: the (C, C) confusion matrix of the last validated epoch, as nested lists, or None.
      before: that of the last epoch of the stage before, or None.
    """

    stage: int
    epoch: int = 1
    updates: int = 0
    seconds: float = 0.0
    rows: int = 0
    checksum: int | None = None
    last: list[list[int]] | None = None
    before: list[list[int]] | None = None


@dataclasses.dataclass(frozen=True)
class Records:
    """Where a run writes while it trains.

    Attributes:
      manager: the checkpoints; None in a process that writes nothing.
      log: the metrics; None likewise.
      meta: what every checkpoint holds, as JSON.
      stop: whether the run was asked to stop.
    """

    manager: Any
    log: MetricsLog | None
    meta: dict[str, Any]
    stop: Stop


def resume(run: Run, manager: Any) -> tuple[train.TrainState, Progress] | None:
    """Reads the last checkpoint, or the one before it where that is damaged; None if there is none.

    Every checkpoint is read, so that a damaged one is found now and not when the run is over; it is renamed.

    Raises:
      ValueError: there are checkpoints, or there were, and all are damaged.
      OSError: one cannot be read, or a damaged one not be renamed.
    """
    restored = None
    for number in sorted(manager.all_steps()):
        try:
            progress = Progress(**checkpoint.read_meta(manager, number)["progress"])
            restored = checkpoint.restore_state(manager, number, _first_state(run, progress.stage)), progress
        except ValueError as error:
            aside = checkpoint.set_aside(manager, number, str(error))
            print(f"warning: {error}; it is now called {aside.name}, and not used", file=sys.stderr)
    if restored is None and checkpoint.list_set_aside(manager.directory):
        raise ValueError(f"no checkpoint in {manager.directory} can be read: start anew with another --workdir")
    return restored


def share_resumed(
    run: Run, resumed: tuple[train.TrainState, Progress] | None
) -> tuple[train.TrainState, Progress] | None:
    """What `resume` gave the first process, in all."""
    if run.processes.number == 1:
        return resumed
    progress = json.loads(run.processes.from_first(json.dumps(resumed and dataclasses.asdict(resumed[1]))))
    if progress is None:
        return None
    progress = Progress(**progress)
    state = resumed[0] if resumed else _first_state(run, progress.stage)
    return run.processes.arrays_from_first(state), progress


def train_stages(
    run: Run,
    resumed: tuple[train.TrainState, Progress] | None,
    evaluate: Callable[[Any], np.ndarray | None],
    records: Records,
) -> None:
    """Trains stage after stage, each from where the last one ended, until the end or until it is asked to stop.

    Args:
      run: the run.
      resumed: from `resume`.
      evaluate: variables -> (C, C) int64 confusion matrix of the validation split, or None if it broke off.
      records: where to write.

    Raises:
      DivergedError: the loss or a parameter is not finite.
      OSError: a checkpoint cannot be written.
    """
    state, progress = resumed or (None, Progress(min(run.stages)))
    variables, step = run.variables, 0
    for number, stage in run.stages.items():
        if number < progress.stage:
            continue
        if number > progress.stage:
            state, progress = None, Progress(number, before=progress.last)
        tx = _make_optimizer(run, number)
        if state is None:
            state = train.start_stage(variables, tx, run.devices, step)
        variables, step, progress = train_one_stage(
            run, tx, train.replicate(state, run.devices), progress, evaluate, records
        )
        if records.stop.signal is not None:
            return
        confusion = np.array(progress.last)
        print(f"\nvalidation split after {stage.name}:")
        print_table(confusion, run.labels)
        if progress.before is not None:
            print(stage_difference(np.array(progress.before), confusion, run.labels.names))


def train_one_stage(
    run: Run,
    tx: optax.GradientTransformation,
    state: train.TrainState,
    progress: Progress,
    evaluate: Callable[[Any], np.ndarray | None],
    records: Records,
) -> tuple[Any, int, Progress]:
    """Trains one stage, with a progress bar, a log row for each update, and checkpoints; arguments as `train_stages`'s.

    There is a checkpoint after each epoch, every `save_minutes` within one, and where the run is asked to stop.

    Returns:
      The variables and the global step at the end, and the progress.
    """
    settings, log, stop = run.settings, records.log, records.stop
    number, stage = progress.stage, run.stages[progress.stage]
    steps = loader.steps_per_epoch(run.splits["train"], settings.batch_size)
    done = (progress.epoch - 1) * steps + progress.updates
    variables, step = {"params": state.params, "batch_stats": state.batch_stats}, int(state.step)
    # For the log, once there is something to log: the device has work by then.
    first_step, rates = step - done, functools.cache(lambda: _learning_rates(run, number))
    losses, saved = _losses_so_far(settings.workdir, progress) if log else [], time.perf_counter()
    began = saved - progress.seconds

    def wants_state() -> bool:
        return stop.poll(due=time.perf_counter() - saved > 60 * settings.save_minutes)

    place = progress.epoch, progress.updates
    # A run that was stopped between the stages has nothing more to do in the first.
    features = compute_features(run, number, variables, stop) if progress.epoch <= stage.epochs else None
    if stop.signal is not None:
        if log and not records.manager.all_steps():
            progress = _save(records, stage, train.Halfway(*place, state), progress)
        return variables, step, progress
    batches = _batches(run, number, done, features)
    # Nothing else is drawn from this key: NumPy draws the first variables.
    key, model = jax.random.key(settings.seed), run.make_model(settings.dropout[number - 1])
    events = train.run_stage(
        model, tx, state, stage, key, batches, steps, evaluate, run.devices, start=place, wants_state=wants_state
    )
    last_update = None
    images = {"total": stage.epochs * steps * settings.batch_size, "initial": done * settings.batch_size}
    with tqdm(**images, desc=stage.name, unit="img", disable=None if log else True, smoothing=0.1) as bar:
        for event in _explain(events, run, stage, first_step, rates):
            if isinstance(event, train.StepDone):
                losses.append(event.loss)
                last_update = event
                if log:
                    log.step(number, event.epoch, event.step, event.loss, float(rates()[event.step - 1 - first_step]))
                bar.update(settings.batch_size)
                bar.set_postfix(loss=f"{event.loss:.3f}", refresh=False)
                continue
            seconds = time.perf_counter() - began
            if isinstance(event, train.EpochDone):
                if log:
                    _tell_epoch(log, number, stage, event, float(np.mean(losses)), seconds)
                # The next step donates the state's buffers: only the last epoch's outlive the loop.
                variables, step = {"params": event.state.params, "batch_stats": event.state.batch_stats}, event.step
                progress = Progress(number, event.epoch + 1, last=event.confusion.tolist(), before=progress.before)
                losses, began = [], time.perf_counter()
            else:
                progress = dataclasses.replace(progress, epoch=event.epoch, updates=event.updates, seconds=seconds)
            if log:
                with _explained(run, stage, first_step, rates, last_update):
                    progress = _save(records, stage, event, progress)
            saved = time.perf_counter()
            if stop.settle():
                break
    return variables, step, progress


def _first_state(run: Run, number: int) -> train.TrainState:
    """A state of the stage, as its checkpoints hold it."""
    return train.start_stage(run.variables, _make_optimizer(run, number), run.devices)


def _schedule(run: Run, number: int) -> tuple[optax.Schedule, int]:
    """A stage's learning rate as a function of its update, and how many updates it has."""
    stage, settings = run.stages[number], run.settings
    steps = stage.epochs * loader.steps_per_epoch(run.splits["train"], settings.batch_size)
    return optimizer.make_schedule(stage.schedule, stage.learning_rate, steps), steps


def _make_optimizer(run: Run, number: int) -> optax.GradientTransformation:
    """A stage's optimizer."""
    stage, (rate, _) = run.stages[number], _schedule(run, number)
    return optimizer.make_optimizer(rate, stage.freeze_encoder, run.settings.adam_b2, stage.encoder_rate)


def _learning_rates(run: Run, number: int) -> np.ndarray:
    """The learning rate of each of a stage's updates, for the log.

    All at once: asked for each update, a schedule would be computed on the device, each time behind its queue.
    """
    rate, steps = _schedule(run, number)
    return np.broadcast_to(np.asarray(jax.jit(rate)(np.arange(steps))), steps)


def _batches(run: Run, number: int, start: int, features: np.ndarray | None) -> Any:
    """A stage's training batches; each stage draws its own order, so that a seed's stages do not repeat each other."""
    settings = run.settings
    return loader.train_batches(
        run.splits["train"],
        image_size=settings.image_size,
        batch_size=settings.batch_size,
        seed=2 * settings.seed + number,
        start=start,
        part=run.processes.part,
        features=features,
        scale_range=settings.scale_range if settings.augment == "scale-crop" else None,
    )


def _losses_so_far(workdir: pathlib.Path, progress: Progress) -> list[float]:
    """The losses of the epoch's updates that an earlier process made."""
    steps = read_metrics(workdir, "step", progress.stage)
    return steps["loss"][steps["epoch"] == progress.epoch].tolist()


def _tell_epoch(
    log: MetricsLog, number: int, stage: train.Stage, event: train.EpochDone, loss: float, seconds: float
) -> None:
    """Logs a validated epoch and prints its line."""
    iou = metrics.iou_per_class(event.confusion)
    log.epoch(number, event.epoch, event.step, loss, event.mean_iou, iou, seconds)
    result = f"loss {loss:.4f}  val mean_iou {event.mean_iou:.4f}  {seconds:.1f} s"
    tqdm.write(f"epoch {event.epoch}/{stage.epochs}  {result}")


def _save(records: Records, stage: train.Stage, event: train.EpochDone | train.Halfway, progress: Progress) -> Progress:
    """Saves a checkpoint, once the log's rows are on the disk; returns the progress with their number."""
    log = records.log
    if log is None:  # in a process that writes nothing
        return progress
    log.flush()
    progress = dataclasses.replace(progress, rows=log.rows, checksum=log.checksum)
    meta = {"stage_name": stage.name, "epoch": event.epoch, "progress": dataclasses.asdict(progress)}
    checkpoint.save(records.manager, event.state, getattr(event, "mean_iou", None), {**records.meta, **meta})
    return progress


def _explain(
    events: Iterator, run: Run, stage: train.Stage, first_step: int, rates: Callable[[], np.ndarray]
) -> Iterator[train.StepDone | train.EpochDone | train.Halfway]:
    """Passes the events on; says of a loss that is not finite what a person needs to look for the cause."""
    try:
        yield from events
    except train.NonFiniteLossError as error:
        with _explained(run, stage, first_step, rates, error):
            raise


@contextlib.contextmanager
def _explained(
    run: Run,
    stage: train.Stage,
    first_step: int,
    rates: Callable[[], np.ndarray],
    update: train.StepDone | train.NonFiniteLossError | None,
) -> Iterator[None]:
    """Adds the learning rate and the images of an update to what a FloatingPointError within says."""
    try:
        yield
    except FloatingPointError as error:
        if update is None:
            raise
        index = () if update.index is None else update.index
        names = [run.splits["train"][int(place)]["name"] for place in index[:_SHOWN]]
        more = ", ..." if len(index) > _SHOWN else ""
        raise DivergedError(
            f"{error} ({stage.name}, learning rate {rates()[update.step - 1 - first_step]:g}; images {', '.join(names)}"
            f"{more}): lower the learning rate, look at these images, or find the operation with --debug-nans",
            update.step,
        ) from None
