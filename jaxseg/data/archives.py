"""The files of a folder or an archive, read by their names: an archive is never unpacked, so it writes nothing."""

import dataclasses
import hashlib
import os
import pathlib
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator

from jaxseg.data.images import UnreadableFileError


@dataclasses.dataclass(frozen=True)
class Files:
    """Files that can be read by name, from several threads.

    Attributes:
      place: the folder or the archive.
      names: of the files, with slashes, below the folder that was asked for.
      read: gives a file's content by its name; UnreadableFileError if it cannot be read.
    """

    place: pathlib.Path
    names: frozenset[str]
    read: Callable[[str], bytes]

    def where(self, name: str) -> str:
        """What messages call a file."""
        return f"{self.place / name}" if self.place.is_dir() else f"{self.place}, {name}"


def folder_files(root: pathlib.Path, folders: tuple[str, ...]) -> Files:
    """The files of some folders of `root` ("" for its own), not of those within them; one that is missing has none."""
    names = {f"{folder}/{entry.name}".lstrip("/") for folder in folders for entry in _entries(root / folder)}

    def read(name: str) -> bytes:
        try:
            return (root / name).read_bytes()
        except OSError as error:
            raise UnreadableFileError(f"{root / name}: cannot be read ({error.strerror})") from error

    return Files(root, frozenset(names), read)


def tar_files(path: pathlib.Path, prefix: str) -> Files:
    """The files of an uncompressed tar archive below `prefix`, which ends in a slash."""
    archive = tarfile.open(path, "r:")  # noqa: SIM115 - it stays open as long as there are `Files`
    lock = threading.Lock()
    members = {m.name.removeprefix(prefix): m for m in archive if m.isfile() and m.name.startswith(prefix)}

    def read(name: str) -> bytes:
        if name not in members:
            raise UnreadableFileError(f"{path}, {name}: no such file in the archive")
        with lock:
            return _read_member(archive, members[name])

    return Files(path, frozenset(members), read)


def zip_files(path: pathlib.Path, prefix: str) -> Files:
    """The files of a zip archive below `prefix`, which ends in a slash."""
    archive = zipfile.ZipFile(path)
    names = {
        i.filename.removeprefix(prefix) for i in archive.infolist() if not i.is_dir() and i.filename.startswith(prefix)
    }

    def read(name: str) -> bytes:
        if name not in names:
            raise UnreadableFileError(f"{path}, {name}: no such file in the archive")
        return archive.read(prefix + name)

    return Files(path, frozenset(names), read)


def stream_tar(path: pathlib.Path, prefix: str) -> Iterator[tuple[str, bytes]]:
    """The names and contents of the files below `prefix` in a compressed tar archive, in its order, in one pass."""
    with tarfile.open(path, "r|*") as archive:
        for member in archive:
            if member.isfile() and member.name.startswith(prefix):
                yield member.name.removeprefix(prefix), _read_member(archive, member)


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return b"" if file is None else file.read()  # None for what is no file, which is not asked for


def fingerprint(root: pathlib.Path, folders: tuple[str, ...]) -> str:
    """Twelve hexadecimal digits that change when a file of the folders comes, goes, or is written."""
    state = hashlib.sha256()
    for folder in folders:
        for entry in sorted(_entries(root / folder), key=lambda entry: entry.name):
            status = entry.stat()
            state.update(f"{folder}/{entry.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return state.hexdigest()[:12]


def _entries(folder: pathlib.Path) -> list[os.DirEntry]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return [entry for entry in entries if entry.is_file() and not entry.name.startswith(".")]
