"""Files that are whole or not there, whatever happens while they are written, and by one process at a time."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: two processes may then spoil each other's files.
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives the path of a new file beside `path`, of the same suffix, which takes its place once it is on the disk.

    Args:
      path: of the file to be, which may exist.

    Raises:
      OSError: it cannot be written; it names the file. What was at `path` before is still there.
    """
    new = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        yield new
        sync(new)
        new.replace(path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise OSError(error.errno, f"cannot be written ({error.strerror or error})", str(path)) from error
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Writes a JSON file that people can read, too; raises OSError as `replacing` does."""
    with replacing(path) as new:
        new.write_text(json.dumps(content, indent=2) + "\n")


def sync(path: pathlib.Path) -> None:
    """Returns when a file, or the names in a folder, are on the disk, where a power cut leaves them."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Holds a lock that ends with the process; a second process waits for the first, and says so.

    Args:
      path: of the lock's file, which is empty, and stays because removing it would be a race.

    Raises:
      OSError: it cannot be made.
    """
    with path.open("a") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that holds {path}", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:  # Some network file systems.
                print(f"no lock at {path} ({error.strerror}): let no other process make the same file", flush=True)
        yield
