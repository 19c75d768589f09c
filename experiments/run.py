"""One training run, from settings to pictures: what every training experiment has in common."""

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging as absl_logging

from experiments.compiled import keep_compiled_programs
from experiments.datasets import find_data
from experiments.memory import give_back_what_compiling_took
from experiments.prepare import FindData, MakeDecoder, Run, prepare
from experiments.processes import Agreement, Mistake, Processes, start
from experiments.results import draw, print_table, write_results
from experiments.settings import Settings, to_json
from experiments.stages import Records, resume, share_resumed, train_stages
from experiments.stop import Stop, Terminated, catch_signals, interrupted_by_signals
from experiments.workdir import check_workdir, claim_workdir, differ
from jaxseg import boundary, checkpoint, metrics, optimizer, summary, train
from jaxseg.data import loader
from jaxseg.data.images import UnreadableFileError
from jaxseg.log import MetricsLog


def run(settings: Settings, make_decoder: MakeDecoder) -> int:
    """Trains, evaluates and draws, or goes on with a run that was stopped; returns the exit code.

    Args:
      settings: complete settings.
      make_decoder: (num_classes, dropout_rate) -> decoder.
    """
    return work_together(settings, lambda processes, settings: run_once(processes, settings, make_decoder))


def work_together(settings: Settings, work: Callable[[Processes, Settings], int | None]) -> int:
    """Connects the processes and lets each of them work; what ends that early is said in a line.

    Args:
      settings: complete settings.
      work: takes the processes and the settings, in which the first process' workdir stands; returns None or, when all
        is saved, the number of the signal that stopped it.

    Returns:
      The exit code.
    """
    # What Orbax's threads cannot write they show with tracebacks; it is raised again where it can be told in a line.
    absl_logging.set_verbosity(absl_logging.FATAL)
    keep_compiled_programs()
    give_back_what_compiling_took()
    try:
        processes = start(settings)
        find_devices()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        # Not jax.config.update: what is compiled already would then be searched no more.
        with processes.silence_others(), interrupted_by_signals(), jax.debug_nans(settings.debug_nans):
            code = work_in(processes, settings, work)
    except BrokenPipeError:  # whoever read what is printed has enough of it, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    return processes.leave(code)


def find_devices() -> None:
    """Raises ValueError if JAX finds no device to compute on."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = f" of JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}" if "JAX_PLATFORMS" in os.environ else ""
        raise ValueError(f"JAX finds no device{asked} ({(str(error).splitlines() or [repr(error)])[0]})") from error


def work_in(processes: Processes, settings: Settings, work: Callable[[Processes, Settings], int | None]) -> int:
    """`work_together`, once the processes are connected."""
    # The first one writes; the others may have been given another folder, or none, and must evaluate as often as it.
    written = {"workdir": str(settings.workdir), "boundary_iou": settings.boundary_iou}
    written = json.loads(processes.from_first(json.dumps(written)))
    settings = dataclasses.replace(settings, **{**written, "workdir": pathlib.Path(written["workdir"])})
    try:
        stopped = work(processes, settings)
    except BrokenPipeError:
        raise
    except UnfinishedError as error:
        print(f"error: {error}; {how_to_go_on(processes, settings.workdir)}", file=sys.stderr)
        return 1
    except (Mistake, UnreadableFileError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        if settings.debug_nans:
            raise  # the traceback is what was asked for
        print(f"error: {error}; {what_is_kept(processes, settings.workdir)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as signal:
        print(f"\nstopped; {how_to_go_on(processes, settings.workdir)}", file=sys.stderr)
        return 143 if isinstance(signal, Terminated) else 130
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            smaller = "a smaller --batch-size or --image-size"
            smaller += ", or --eval-size fixed" if settings.eval_size == "native" else ""
            print(f"error: not enough memory: give {smaller} ({error})", file=sys.stderr)
            return 1
        if processes.number == 1:
            raise
        reason = str(error).splitlines()[0]
        lost = f"another process of the run has ended, or cannot be reached ({reason})"
        print(f"error: {lost}; {how_to_go_on(processes, settings.workdir)}", file=sys.stderr)
        return 1
    if stopped is not None:
        if processes.first:
            print(f"stopped, and saved; {how_to_go_on(processes, settings.workdir)}", file=sys.stderr)
        return 128 + stopped
    return 0


def run_once(
    processes: Processes, settings: Settings, make_decoder: MakeDecoder, find_data: FindData = find_data
) -> int | None:
    """One run in one workdir; several may follow each other.

    Args:
      processes: the processes of the run, connected.
      settings: complete settings, with the first process' workdir.
      make_decoder: (num_classes, dropout_rate) -> decoder.
      find_data: finds the data set, as `experiments.datasets.find_data`.

    Returns:
      None, or the number of the signal that stopped it once all was saved.

    Raises:
      Mistake: something does not fit.
      OSError: a file or folder cannot be read, or the workdir not be made.
      UnfinishedError: a file cannot be written.
      DivergedError: the loss or a parameter is not finite.
    """
    prepared = prepare_in_turn(processes, settings, make_decoder, find_data)
    if settings.summary:
        print(summary.format_summary(summary.list_layers(prepared.model, settings.image_size)))
        return None
    with contextlib.ExitStack() as stack:
        meta = describe_run(prepared)
        with processes.share_mistakes():
            if processes.first:
                stack.enter_context(claim_workdir(settings.workdir, meta))
        try:
            stopped = execute(prepared, meta)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise UnfinishedError(str(error)) from error
        processes.wait_for_all()
    return stopped


class UnfinishedError(Exception):
    """What began can be gone on with, when a person has put right what this says in a line."""


def how_to_go_on(processes: Processes, workdir: pathlib.Path) -> str:
    """What a person can do after a run has ended early."""
    return _tell(
        processes,
        workdir,
        saved=f"the same command with --workdir {workdir} goes on from the last checkpoint",
        nothing="nothing was saved yet: the same command begins anew",
        unseen="the same command goes on from what the first process has saved, if anything",
    )


def what_is_kept(processes: Processes, workdir: pathlib.Path) -> str:
    """What a person still has after a run has diverged."""
    return _tell(
        processes,
        workdir,
        saved=f"the checkpoints in {workdir} are from before it",
        nothing="nothing was saved before it",
        unseen="the first process knows what was saved before it",
    )


def _tell(processes: Processes, workdir: pathlib.Path, saved: str, nothing: str, unseen: str) -> str:
    """Which of three is true of the workdir, which only the first process is sure to see."""
    if not processes.first:
        return unseen
    return saved if _holds_checkpoints(workdir) else nothing


def _holds_checkpoints(workdir: pathlib.Path) -> bool:
    """Whether there is one of a run, or of the runs of an experiment of several."""
    saved = [*workdir.glob("checkpoints/*"), *workdir.glob("*/checkpoints/*")]
    return any(path.name.isdigit() for path in saved)


def prepare_in_turn(processes: Processes, settings: Settings, make_decoder: MakeDecoder, find_data: FindData) -> Run:
    """Prepares in the first process, which may render or download, then in the others, and makes sure that all agree.

    Raises:
      Mistake: something does not fit, in any process.
      OSError: a file or folder cannot be read.
    """
    check_equal(processes, {"settings": to_json(settings)})
    with processes.share_mistakes():
        if processes.first:
            check_workdir(settings.workdir, {"settings": to_json(settings)})
            prepared = prepare(settings, make_decoder, processes, find_data)
    with processes.share_mistakes():
        if not processes.first:
            prepared = prepare(settings, make_decoder, processes, find_data)
    check_equal(processes, describe_run(prepared))
    return dataclasses.replace(prepared, variables=processes.arrays_from_first(prepared.variables))


def check_equal(processes: Processes, meta: dict[str, Any]) -> None:
    """Raises Mistake, in all processes, unless all have the same `meta`."""
    there, *others = map(json.loads, processes.gather(json.dumps(meta)))
    for index, here in enumerate(others, 1):
        if found := differ(there, here):
            raise Mistake(f"process 0 (there) and process {index} (here) differ: {'; '.join(found)}")


def describe_run(run: Run) -> dict[str, Any]:
    """What config.json and every checkpoint say of a run, and what a run that goes on must agree with."""
    images = {split: len(source) for split, source in run.splits.items()}
    weights = next(iter(run.stages.values())).class_weights
    labels = {"names": list(run.labels.names), "colours": [list(colour) for colour in run.labels.colours]}
    model = {"decoder": type(run.model.decoder).__name__, "class_weights": weights and list(weights)}
    return {"settings": to_json(run.settings), **model, **labels, "images": images}


def describe(stage: train.Stage, params: Any) -> str:
    """One line: what is frozen in a stage and what trains, with parameter counts."""
    fates = optimizer.parameter_labels(params, stage.freeze_encoder)
    counts: dict[str, int] = {}
    parts: dict[str, set[str]] = {}
    for part, tree in params.items():
        for fate, leaf in zip(jax.tree.leaves(fates[part]), jax.tree.leaves(tree), strict=True):
            counts[fate] = counts.get(fate, 0) + leaf.size
            parts.setdefault(fate, set()).add(part)
    what = [
        f"{verb} {' and '.join(sorted(parts[fate]))} ({counts[fate]:,} parameters)"
        for fate, verb in (("train", "trains"), ("frozen", "keeps"))
        if fate in counts
    ]
    epochs = "epoch" if stage.epochs == 1 else "epochs"
    rate = f"learning rate {stage.learning_rate:g}"
    if not stage.freeze_encoder and stage.encoder_rate != 1:
        rate += f", the encoder's {stage.learning_rate * stage.encoder_rate:g}"
    return f"{stage.name}: {', '.join(what)}; {stage.epochs} {epochs}, {rate}"


def execute(run: Run, meta: dict[str, Any]) -> int | None:
    """Trains all stages, then evaluates the best checkpoint and draws; everything goes below the workdir.

    Returns:
      None, or the number of the signal that stopped it.
    """
    workdir = run.settings.workdir
    sizes = ", ".join(f"{len(source)} {name}" for name, source in run.splits.items())
    together = f" in {run.processes.number} processes" if run.processes.number > 1 else ""
    print(f"images: {sizes}; devices: {len(run.devices)} {run.devices[0].device_kind}{together}")
    number, size = len(run.splits["train"]), run.settings.batch_size
    if left := number % size:
        print(f"each epoch trains on {number - left} of the {number} images, batches of {size}; which are left changes")
    for number in (1, 2):
        line = describe(run.stages[number], run.variables["params"]) if number in run.stages else None
        print(line or f"stage {number}: left out (0 epochs)")
    processes, manager, log, resumed = run.processes, None, None, None
    with contextlib.ExitStack() as checkpoints:
        with contextlib.ExitStack() as logs:
            agreement = Agreement(run.devices) if processes.number > 1 else None
            stop = logs.enter_context(catch_signals(agreement))
            with processes.share_mistakes():
                if processes.first:
                    manager = checkpoints.enter_context(checkpoint.open_checkpoints(workdir / "checkpoints"))
                    resumed = resume(run, manager)
                    rows, step, checksum = 0, 0, None
                    if resumed:
                        state, progress = resumed
                        rows, step, checksum = progress.rows, int(state.step), progress.checksum
                        over = progress.epoch > run.stages[progress.stage].epochs
                        place = "which is over" if over else f"epoch {progress.epoch}"
                        print(f"going on after {step} update{'s' * (step != 1)}: stage {progress.stage}, {place}")
                    log = logs.enter_context(open_log(run, rows, step, checksum))
            resumed = share_resumed(run, resumed)
            # One function for all splits and stages: it compiles once where the labels' sizes agree.
            evaluate = make_evaluate(run, stop)
            train_stages(run, resumed, lambda variables: evaluate(variables, "val"), Records(manager, log, meta, stop))
            if manager:
                checkpoint.wait(manager)
            stop.settle()
        if stop.signal is not None:
            return int(stop.signal)
        variables, saved = run.variables, None
        with processes.share_mistakes():
            if manager:
                variables, saved = checkpoint.restore_model(manager, checkpoint.BEST, variables)
    saved = json.loads(processes.from_first(json.dumps(saved)))
    if run.settings.boundary_iou:
        evaluate = make_evaluate(run, stop, boundary=True)
    finish(run, processes.arrays_from_first(variables), saved, evaluate)
    return None


def open_log(run: Run, rows: int, step: int, checksum: int | None) -> MetricsLog:
    """As `MetricsLog`; says what else a person can do where the rows that a checkpoint counts on are gone."""
    workdir = run.settings.workdir
    try:
        return MetricsLog(workdir, run.labels.num_classes, rows, step, checksum)
    except ValueError as error:
        other = f"begin where it stands in another --workdir with --weights {workdir} --weights-scope all"
        raise ValueError(f"{error}, or {other}") from error


def finish(run: Run, variables: Any, saved: dict[str, Any], evaluate: Callable[[Any, str], Any]) -> None:
    """Evaluates the best checkpoint on the test split, if there is one, writes the results and draws.

    With --boundary-iou, `evaluate` counts what it needs, and the validation split is evaluated once more for it.
    """
    best = np.array(saved["progress"]["last"])
    best_epoch = f"{saved['stage_name']}, epoch {saved['epoch']}"
    print(f"\nbest on the validation split: {best_epoch}, mean_iou {metrics.mean_iou(best):.6f}")
    confusions, boundary_ious = {"val": best}, {}
    on_devices = train.replicate(variables, run.devices)
    if run.settings.boundary_iou:
        boundary_ious["val"] = boundary.boundary_iou_per_class(evaluate(on_devices, "val"))
        print_table(best, run.labels, boundary_ious["val"])
    if "test" in run.splits:
        counts = evaluate(on_devices, "test")
        if run.settings.boundary_iou:
            boundary_ious["test"] = boundary.boundary_iou_per_class(counts)
            counts = boundary.without_boundary(counts)
        confusions["test"] = counts
        print(f"test split, at that epoch ({best_epoch}):")
        print_table(counts, run.labels, boundary_ious.get("test"))
    if not run.processes.first:
        return
    workdir = run.settings.workdir
    checkpoint_of = {"stage": saved["stage_name"], "epoch": saved["epoch"]}
    draw(run, variables, best, f"validation split, {best_epoch}")
    # Last: a run that has its results is over.
    write_results(workdir, checkpoint_of, confusions, run.labels, boundary_ious)
    print(f"\neverything is in {workdir}: config.json, metrics.csv, results.json, events/, checkpoints/, figures/")


def make_evaluate(run: Run, stop: Stop, boundary: bool = False) -> Callable[[Any, str], np.ndarray | None]:
    """Builds the evaluation of variables on a split of the run's data; it breaks off with None if asked to stop."""
    native = run.settings.eval_size == "native"
    options = {"native": native, "boundary": boundary}
    evaluate = train.make_evaluate(run.model, run.labels.num_classes, run.devices, **options)
    image_size = None if native else run.settings.image_size

    def evaluate_split(variables: Any, split: str) -> np.ndarray | None:
        sizes: dict[str, Any] = {"image_size": image_size, "batch_size": run.settings.batch_size}
        batches = loader.eval_batches(run.splits[split], part=run.processes.part, **sizes)
        confusion = evaluate(variables, stop.until_stopped(batches))
        return confusion if stop.signal is None else None

    return evaluate_split
