"""Verified downloads into a cache: resumable, atomic, and safe with several processes at once."""

import hashlib
import http.client
import os
import queue
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxseg.files import locked

# Seconds without an answer, or without a byte, after which the network counts as absent.
TIMEOUT = 8.0
_CHUNK = 2**18


class _Failed(Exception):
    """Why a download failed; what to do about it is added by `fetch`."""


def cache_folder() -> Path:
    """The folder of downloads: `$XDG_CACHE_HOME/jaxseg`, or `~/.cache/jaxseg`; ValueError if there is no home."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is to be ignored.
    if os.path.isabs(root):
        return Path(root) / "jaxseg"
    try:
        return Path.home() / ".cache" / "jaxseg"
    except RuntimeError as error:
        raise ValueError(
            f"there is no folder for downloads ({error}): set XDG_CACHE_HOME to one, or give a file with --weights PATH"
        ) from None


def fetch(
    name: str,
    base_url: str,
    folder: Path | None = None,
    timeout: float = TIMEOUT,
    *,
    digest: str | None = None,
    remedy: str = "give a file with --weights PATH",
) -> Path:
    """Finds a file in the cache, or downloads it there with a progress bar.

    What has come is kept as `<name>.part` and resumed, also by a later call; only a file with the right digest gets
    its name. A second process waits for the first.

    Args:
      name: the file's; without `digest` with the first hexadecimal digits of its sha256: `<stem>-<digits>.<suffix>`.
      base_url: what the name is appended to; ends in a slash.
      folder: the cache; made if it is missing; `cache_folder()` if None.
      timeout: seconds to wait for an answer and for each piece of the file.
      digest: such as `md5:82b4d87c...`; a file that is there already is then verified too.
      remedy: what else the user can do.

    Returns:
      The path of the file.

    Raises:
      ValueError: it cannot be had; one line with the reason, the cache folder and the way out.
    """
    folder = cache_folder() if folder is None else folder
    path, there = folder / name, True
    try:
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder / f"{name}.lock"):
                if not path.is_file():
                    there = False
                    _download(base_url + name, path, timeout, digest or _digest_in(name))
    except (OSError, ValueError, http.client.HTTPException, _Failed) as error:  # ValueError: of a URL, of a header
        reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
        raise ValueError(
            f"cannot download {base_url}{name} ({reason}): {_go_on(path)}put {name} into {folder}, or {remedy}"
        ) from None
    if there and digest:
        verify(path, digest)
    return path


def verify(path: Path, digest: str) -> None:
    """Raises ValueError, with the way out, unless a file has the digest, such as `md5:82b4d87c...`; shows progress."""
    found = _digest(path, digest)
    if found != digest:
        raise ValueError(
            f"{path} is damaged or another file: it has {found}, not {digest}; remove it or download it again"
        )


def _go_on(path: Path) -> str:
    """What to do with what has come of a file, if anything has."""
    try:
        size = _size(_part(path))
    except OSError:
        return ""
    return f"the {size} bytes that came are kept, and the same command goes on from there; or " if size else ""


def _digest_in(name: str) -> str:
    """The digest that a file's name ends in."""
    (digits,) = re.findall(r"-([0-9a-f]{8,})\.\w+$", name)
    return f"sha256:{digits}"


def _download(url: str, path: Path, timeout: float, digest: str) -> None:
    """Downloads to `<path>.part`, resuming what is there, and renames it if its digest is right."""
    part = _part(path)
    resumed = _size(part) > 0
    with tqdm(desc=path.name, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:
        _complete(url, part, timeout, bar)
        found = _digest(part, digest)
        if resumed and found != digest:
            # What was there may have been the beginning of something else.
            part.unlink()
            _complete(url, part, timeout, bar)
            found = _digest(part, digest)
    if found != digest:
        part.unlink()
        raise _Failed(f"what came has {found}, not {digest}")
    os.replace(part, path)


def _complete(url: str, part: Path, timeout: float, bar: tqdm) -> None:
    """Asks for the rest of a file until all of it is there; gives up when an answer brings it no further."""
    longest = _size(part)
    while not _append(url, part, timeout, bar):
        if _size(part) <= longest:
            raise _Failed("the connection broke")
        longest = _size(part)


def _append(url: str, part: Path, timeout: float, bar: tqdm) -> bool:
    """Asks once for the rest of a file and appends what comes; returns whether the file is complete."""
    start = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = _within(timeout, lambda: urllib.request.urlopen(request, timeout=timeout))
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and start:
            # There is nothing behind what is there: the digest tells whether it is the file.
            return True
        raise _Failed(f"HTTP {error.code} {error.reason}") from None
    with response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            start = 0  # A server that knows no ranges sends the whole file.
        length = response.headers.get("Content-Length")
        if length is not None and not length.isdecimal():
            raise _Failed("the answer's header gives no valid length")
        bar.reset(None if length is None else start + int(length))
        bar.update(start)
        with part.open("r+b" if start else "wb") as file:
            file.seek(start)
            while chunk := _read(response):
                file.write(chunk)
                bar.update(len(chunk))
    return chunk is not None and (length is None or _size(part) == start + int(length))


def _read(response: http.client.HTTPResponse) -> bytes | None:
    """Reads a piece; b"" at the end, None where the connection broke: what has come is kept."""
    try:
        # Not `read`, which waits for all of a chunk, and when the connection stalls loses the part that had come.
        return response.read1(_CHUNK)
    except (OSError, http.client.HTTPException):
        return None


def _within(seconds: float, function: Callable[[], Any]) -> Any:
    """Calls a function in a thread and waits so long; a socket's timeout counts neither name look-ups nor retries."""
    results: queue.SimpleQueue = queue.SimpleQueue()

    def call() -> None:
        try:
            results.put((function(), None))
        except Exception as error:
            results.put((None, error))

    threading.Thread(target=call, daemon=True).start()
    try:
        value, error = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return value


def _part(path: Path) -> Path:
    """Where a file is kept until it is complete."""
    return path.with_name(path.name + ".part")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _digest(path: Path, like: str) -> str:
    """The digest of a file, by the same algorithm and as long as another one."""
    algorithm, _, digits = like.partition(":")
    state, size = hashlib.new(algorithm), _size(path)
    with path.open("rb") as file, tqdm(total=size, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        bar.set_description(f"verifying {path.name}")
        while chunk := file.read(_CHUNK):
            state.update(chunk)
            bar.update(len(chunk))
    return f"{algorithm}:{state.hexdigest()[: len(digits)]}"
