"""The folder that a run writes to: whether it may, and what is there already."""

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from experiments.settings import differences
from jaxseg.files import write_json


def check_folder(workdir: pathlib.Path, option: str = "--workdir") -> None:
    """Raises ValueError, and names the option, if a file is where a folder has to be, or one is not writable."""
    for path in (workdir, *workdir.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{option} {workdir}: {path} is a file: name a folder")
    there = next(path for path in (workdir, *workdir.absolute().parents) if path.is_dir())
    for path in (there, *(workdir / name for name in ("checkpoints", "events", "figures"))):
        if path.is_dir() and not os.access(path, os.W_OK | os.X_OK):
            raise ValueError(f"{option} {workdir}: you may not write to {path}: name a folder of your own")


def check_workdir(workdir: pathlib.Path, meta: dict[str, Any]) -> None:
    """Raises ValueError unless the workdir is missing, empty, or that of a run of the same `meta`, and writable."""
    check_folder(workdir)
    config = workdir / "config.json"
    if not config.exists():
        if workdir.is_dir() and any(workdir.iterdir()):
            raise ValueError(f"--workdir {workdir} is not empty and holds no run: name another, or empty it")
        return
    try:
        found = differ(json.loads(config.read_text()), meta)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{config} is damaged ({error!r}): put it back, or give another --workdir") from error
    if found:
        raise ValueError(
            f"--workdir {workdir} holds a run that differs: {'; '.join(found)}. Go on with its options, or give another"
            f" --workdir (and --weights {workdir} --weights-scope all, to begin where it stands)"
        )


def differ(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """In what two `describe_run` differ, as far as the second one goes."""
    # An older version did not say these.
    there = {"decoder": here.get("decoder"), "class_weights": here.get("class_weights"), **there}
    return differences(there["settings"], here["settings"]) + [
        f"{name} {there[name]} there, {here[name]} here"
        for name in here.keys() - {"settings"}
        if there[name] != here[name]
    ]


@contextlib.contextmanager
def claim_workdir(workdir: pathlib.Path, meta: dict[str, Any]) -> Iterator[None]:
    """Makes the workdir and its config.json, and locks it against other processes.

    Raises:
      ValueError: another process works in it, or `check_workdir` finds a mistake.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    config = workdir / "config.json"
    # Once more: the data is known only now, and another run may have taken the folder meanwhile.
    check_workdir(workdir, meta)
    if not config.exists():
        write_json(config, meta)
    with open(config) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"--workdir {workdir}: another process works in it; wait for it, or name another"
            ) from None
        yield
