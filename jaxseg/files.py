"""Files that are whole or not there, whatever happens while they are written."""

import contextlib
import os
import pathlib
from collections.abc import Iterator


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


def sync(path: pathlib.Path) -> None:
    """Returns when a file, or the names in a folder, are on the disk, where a power cut leaves them."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
