"""Orbax: the best and the last checkpoints of a run, each checked against its checksums when it is read."""

import contextlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jaxseg.files import sync

BEST, LAST = "best", "last"
# A folder among the checkpoints: one that is no longer kept is moved into it first, so that no half of it is ever seen.
_DELETED = "deleted"
# Bytes that a checkpoint takes besides its numbers: some thirty small files.
_BESIDES = 2**20


def open_checkpoints(directory: pathlib.Path) -> ocp.CheckpointManager:
    """Opens, or makes, a folder that keeps the best checkpoint by validation mean IoU, the last, and the one before it.

    Args:
      directory: made if it is missing; what an interrupted save left in it is removed. A checkpoint whose score cannot
        be read is set aside, and a line on stderr says so.

    Raises:
      OSError: it cannot be made, or not be written to.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(directory / _DELETED, ignore_errors=True)
    for path in [path for path in directory.iterdir() if path.name.isdecimal()]:
        try:
            _read_score(path)
        except (ValueError, KeyError, TypeError) as error:
            aside = _set_aside(path, f"the checkpoint {path} is damaged")
            line = f"the score of the checkpoint {path} is damaged ({_first_line(error)})"
            print(f"warning: {line}; it is now called {aside.name}, and not used", file=sys.stderr)
    # `max_to_keep` with `best_fn` would delete the last one.
    best = preservation_policy.BestN(n=1, get_metric_fn=_mean_iou, keep_checkpoints_without_metrics=False)
    options = ocp.CheckpointManagerOptions(
        best_fn=_mean_iou,
        preservation_policy=preservation_policy.AnyPreservationPolicy([preservation_policy.LatestN(2), best]),
        cleanup_tmp_directories=True,
        todelete_subdir=_DELETED,
        create=False,
        multiprocessing_options=_alone(),
    )
    return ocp.CheckpointManager(directory.resolve(), options=options)


def save(manager: ocp.CheckpointManager, state: Any, mean_iou: float | None, meta: dict[str, Any]) -> None:
    """Saves a state in the background, under the number after the last checkpoint's.

    Args:
      manager: from `open_checkpoints`.
      state: a `TrainState`; copied before this returns, so that its buffers may be donated.
      mean_iou: on the validation split, by which the best checkpoint is known; None in the middle of an epoch.
      meta: what is needed to use the model later or to go on from here, as JSON.

    Raises:
      FloatingPointError: the state has a number that is not finite; the checkpoints before it are kept.
      OSError: this one, or the one before, cannot be written.
    """
    # np.array copies where np.asarray would show the device's own buffer, which the next step overwrites.
    host = jax.tree.map(np.array, state)
    model = {"params": host.params, "batch_stats": host.batch_stats}
    train = {"step": host.step, "opt_state": host.opt_state}
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(host)):
        raise FloatingPointError(f"the parameters are not finite after step {int(host.step)}")
    meta = {**meta, "score": mean_iou}
    checksums = {"model": _checksum(model), "train": _checksum(train), "meta": _json_checksum(meta)}
    items = ocp.args.Composite(
        model=ocp.args.StandardSave(model),
        train=ocp.args.StandardSave(train),
        meta=ocp.args.JsonSave({**meta, "checksums": checksums}),
    )
    wait(manager)
    _check_space(manager.directory, sum(leaf.nbytes for leaf in jax.tree.leaves(host)) + _BESIDES)
    number = max(manager.all_steps(), default=0) + 1
    try:
        manager.save(number, args=items, metrics=None if mean_iou is None else {"mean_iou": mean_iou})
    except (OSError, ValueError, RuntimeError) as error:
        raise _unwritable(manager, error) from error


def wait(manager: ocp.CheckpointManager) -> None:
    """Returns when the last checkpoint is complete on the disk, whatever happens then; raises OSError as `save` does.

    Each save waits for the one before it, so that a power cut costs the last checkpoint only.
    """
    _finish(manager)
    if manager.latest_step() is None:
        return
    directory = pathlib.Path(manager.directory)
    path = directory / str(manager.latest_step())
    try:
        # Orbax itself makes sure of the numbers only.
        for each in (*path.rglob("*"), path, directory):
            sync(each)
    except OSError as error:
        raise _unwritable(manager, error) from error
    shutil.rmtree(directory / _DELETED, ignore_errors=True)


def restore_model(manager: ocp.CheckpointManager, which: str | int, template: Any) -> tuple[Any, dict[str, Any]]:
    """Reads the model, and not the optimizer.

    Args:
      manager: from `open_checkpoints`.
      which: `BEST`, `LAST` or a checkpoint's number.
      template: {'params', 'batch_stats'}, arrays or `jax.ShapeDtypeStruct`.

    Returns:
      The variables, numpy arrays in the template's structure, and what was saved as `meta`.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: it is damaged, or does not fit the template.
      OSError: it cannot be read, for reasons that are not its own.
    """
    restored = _restore(manager, _number(manager, which), {"model": template})
    return restored["model"], restored["meta"]


def restore_state(manager: ocp.CheckpointManager, which: str | int, template: Any) -> Any:
    """Reads a whole state, a `TrainState` of numpy arrays; arguments and errors as `restore_model`'s.

    Args:
      manager: from `open_checkpoints`.
      which: `BEST`, `LAST` or a checkpoint's number.
      template: a `TrainState` with the optimizer of the checkpoint's stage.
    """
    model = {"params": template.params, "batch_stats": template.batch_stats}
    train = {"step": template.step, "opt_state": template.opt_state}
    restored = _restore(manager, _number(manager, which), {"model": model, "train": train})
    return template.replace(**restored["model"], **restored["train"])


def read_model(run: pathlib.Path, which: str | int = BEST) -> tuple[Any, dict[str, Any]]:
    """Reads a model of a run that may be going on, or the one of a checkpoint; changes nothing there.

    Args:
      run: the workdir of a run or its folder of checkpoints, or one checkpoint in it, such as `checkpoints/7`. One
        that an older version saved without checksums is read too, unchecked, and a line on stderr says so.
      which: `BEST`, `LAST` or a checkpoint's number; where `run` is one checkpoint, that one is read.

    Returns:
      {'params', 'batch_stats'}, numpy arrays, and what was saved as `meta`.

    Raises:
      ValueError: there is no such checkpoint, or it cannot be read; in one line.
    """
    directory, number = (run / "checkpoints" if (run / "checkpoints").is_dir() else run).resolve(), None
    if directory.name.isdecimal() and any((directory / item).exists() for item in ("model", "meta")):
        directory, number = directory.parent, int(directory.name)
    with _without_warnings(), _open_to_read(directory) as manager:
        if number is None:
            numbers: dict[str | int, Any] = {BEST: manager.best_step, LAST: manager.latest_step}
            number = numbers.get(which, lambda: which)()
        if number is None:
            raise ValueError(
                f"{directory} holds no checkpoint: name the workdir of a run that has finished an epoch, its folder of"
                " checkpoints or one checkpoint in it"
            )
        if not (directory / str(number)).is_dir():
            there = ", ".join(map(str, sorted(manager.all_steps())))
            raise ValueError(f"{directory} has no checkpoint {number}, only {there}")
        restored = _restore(manager, number, {"model": None}, unchecked=True)
        return restored["model"], restored["meta"]


def read_meta(manager: ocp.CheckpointManager, which: str | int) -> dict[str, Any]:
    """Reads what was saved as `meta`; raises as `restore_model` does."""
    return _restore(manager, _number(manager, which), {})["meta"]


def set_aside(manager: ocp.CheckpointManager, number: int, why: str = "it is damaged") -> pathlib.Path:
    """Renames a damaged checkpoint, so that it is no longer one, and returns its new path.

    Args:
      manager: from `open_checkpoints`.
      number: the checkpoint's.
      why: said if it cannot be renamed.

    Raises:
      OSError: it cannot be renamed.
    """
    aside = _set_aside(pathlib.Path(manager.directory) / str(number), why)
    manager.reload()
    return aside


def list_set_aside(directory: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints that were set aside in a folder of checkpoints."""
    return sorted(pathlib.Path(directory).glob("damaged-*"))


def _set_aside(path: pathlib.Path, why: str) -> pathlib.Path:
    names = (f"damaged-{path.name}", *(f"damaged-{path.name}-{again}" for again in range(2, 1000)))
    aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    try:
        path.rename(aside)
    except OSError as error:
        raise OSError(f"{why}; it cannot be renamed to {aside.name} either ({error.strerror})") from error
    return aside


def _read_score(path: pathlib.Path) -> float | None:
    """The validation mean IoU by which Orbax compares checkpoints; None for one without."""
    file = path / "metrics" / "metrics"
    return float(json.loads(file.read_text())["mean_iou"]) if file.exists() else None


def _alone() -> ocp.options.MultiprocessingOptions:
    """A manager is one process' affair; by default, of a run of several processes all would have to call it."""
    process = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})


def _mean_iou(metrics: dict[str, float]) -> float:
    return metrics["mean_iou"]


def _finish(manager: ocp.CheckpointManager) -> None:
    try:
        manager.wait_until_finished()
    except (OSError, ValueError, RuntimeError) as error:
        raise _unwritable(manager, error) from error


def _number(manager: ocp.CheckpointManager, which: str | int) -> int:
    _finish(manager)
    number = {BEST: manager.best_step, LAST: manager.latest_step}[which]() if isinstance(which, str) else which
    if number is None:
        raise FileNotFoundError(f"no checkpoint in {manager.directory}")
    return number


def _restore(manager: ocp.CheckpointManager, number: int, templates: dict[str, Any], unchecked: bool = False) -> Any:
    """Reads the items of `templates`, and 'meta'; compares them with their checksums: Orbax itself has none.

    Args:
      manager: of the checkpoints.
      number: the checkpoint's.
      templates: item -> a tree of arrays or shapes, or None for what is there.
      unchecked: whether a checkpoint without checksums is good too.
    """
    # Without a template Orbax gives what is there.
    templates = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), templates)
    items = {name: ocp.args.StandardRestore(template) for name, template in templates.items()}
    path = pathlib.Path(manager.directory) / str(number)
    damaged = f"the checkpoint {path} is damaged, or of another model"
    # What raises here is no fault of the checkpoint's.
    for file in path.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                opened.read(1)
    try:
        restored = manager.restore(number, args=ocp.args.Composite(meta=ocp.args.JsonRestore(), **items))
        checksums = restored["meta"].pop("checksums", None)
        wrong = [name for name in templates if checksums and _checksum(restored[name]) != checksums[name]]
        # An older version has no checksum of `meta`.
        if checksums and _json_checksum(restored["meta"]) != checksums.get("meta", _json_checksum(restored["meta"])):
            wrong.append("description")
        if checksums and _read_score(path) != restored["meta"].get("score", _read_score(path)):
            wrong.append("score")
    except MemoryError:
        raise
    except Exception as error:  # A damaged checkpoint can raise almost anything.
        raise ValueError(f"{damaged} ({_first_line(error)})") from error
    if checksums is None:
        older = f"{manager.directory / str(number)} has no checksums, an older version saved it"
        if not unchecked:
            raise ValueError(f"the checkpoint {older}: only --weights can read it")
        print(f"note: {older}: it is read unchecked", file=sys.stderr)
        return restored
    if wrong:
        raise ValueError(f"{damaged} (the checksum of its {' and '.join(wrong)} is wrong)")
    return restored


def _open_to_read(directory: pathlib.Path) -> ocp.CheckpointManager:
    """Not `open_checkpoints`, which would remove what another program is just writing."""
    return ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(best_fn=_mean_iou, read_only=True, multiprocessing_options=_alone()),
    )


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Keeps Orbax from warning that a folder is only read."""
    before = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        yield
    finally:
        absl_logging.set_verbosity(before)


def _checksum(tree: Any) -> str:
    """CRC-32 over the names, types, shapes and numbers of all leaves: against accidents, not against malice."""
    value = 0
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
    for path, leaf in sorted(leaves.items()):
        array = np.ascontiguousarray(leaf)
        value = zlib.crc32(f"{path} {array.dtype} {array.shape}".encode(), value)
        value = zlib.crc32(array.reshape(-1).view(np.uint8).data, value)
    return f"{value:08x}"


def _json_checksum(value: Any) -> str:
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def _check_space(directory: pathlib.Path, needed: int) -> None:
    """Raises OSError unless so many bytes can be written: Orbax's threads would say so in hundreds of lines."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            f"no checkpoint can be written to {directory}: it takes {needed / 2**20:.1f} MiB, and the disk has"
            f" {free / 2**20:.1f} MiB left; free some"
        )
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            if hasattr(os, "posix_fallocate"):  # a quota may be less than the disk has; macOS cannot ask
                os.posix_fallocate(file.fileno(), 0, needed)
    except OSError as error:
        raise OSError(
            f"no checkpoint can be written to {directory}: it takes {needed / 2**20:.1f} MiB ({error.strerror})"
        ) from error


def _unwritable(manager: ocp.CheckpointManager, error: Exception) -> OSError:
    return OSError(f"a checkpoint cannot be written to {manager.directory} ({_first_line(error)})")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
