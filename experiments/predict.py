"""Classifies every pixel of photographs with a trained run: a PNG of class indices for each."""

import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from experiments.arguments import quick_arguments
from experiments.memory import keep_freed_memory
from experiments.stop import end_on_ctrl_c
from experiments.trained import ModelOptions, describe, make_classify, open_run, work_until_stopped
from experiments.workdir import check_folder

if TYPE_CHECKING:
    import numpy as np

    from jaxseg.data.labels import Labels
    from jaxseg.manner import Manner, Prepared, Size

# Class maps that wait to be written.
_WAITING = 32


@dataclasses.dataclass(frozen=True)
@quick_arguments
class Settings(ModelOptions):
    """Settings of a prediction."""

    run: Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="RUN")] = dataclasses.field(kw_only=True)
    """The workdir of a run, which may still be training, or one checkpoint in it, such as RUN/checkpoints/7."""
    images: Annotated[tyro.conf.Positional[tuple[pathlib.Path, ...]], tyro.conf.arg(metavar="IMAGE_OR_FOLDER...")] = (
        dataclasses.field(kw_only=True)
    )
    """JPEG or PNG photographs of any size, or folders of them; folders within a folder are not looked into."""
    output: pathlib.Path = dataclasses.field(kw_only=True)
    """The folder for the class maps: for each image a grey PNG of its size (upright, as its EXIF data say) and of its
    stem, whose values are the class indices."""
    overlay: bool = False
    """Draw each image with its classes laid over it and a legend, too, in a folder `overlay` within that folder."""
    overwrite: bool = False
    """Replace files that are there already; never an image that is read."""


@dataclasses.dataclass(frozen=True)
class _Read:
    """An image that was read, if it will be drawn, and as it is classified; or why it was not."""

    path: pathlib.Path
    image: Any = None
    prepared: "Prepared | None" = None
    mistake: str = ""


def main(argv: list[str] | None = None) -> int:
    """Runs the command with the given arguments, or the command line's; returns the exit code."""
    settings = tyro.cli(Settings, prog="python -m experiments.predict", description=__doc__, args=argv)
    keep_freed_memory(may_restart=argv is None)
    end_on_ctrl_c(by_command=argv is None)
    try:
        paths, passed_over = find_images(settings.images)
        check_output(settings, paths)
        trained, manner = open_run(settings.run, settings)
        settings.output.mkdir(parents=True, exist_ok=True)
        if settings.overlay:
            (settings.output / "overlay").mkdir(exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for mistake in passed_over:
        print(f"skipped: {mistake}", file=sys.stderr)
    print(describe(trained, manner))
    classify = make_classify(trained, manner, settings)

    def work() -> int:
        written, seconds = predict(classify, manner, trained.labels, paths, settings)
        rate = f", {written / seconds:.2f} images/s with reading, compiling and writing" if written else ""
        print(f"{written} class map{'s' * (written != 1)} in {settings.output}{rate}")
        if skipped := len(paths) + len(passed_over) - written:
            print(f"error: {skipped} file{'s' * (skipped != 1)} skipped, named above", file=sys.stderr)
        return 1 if skipped else 0

    return work_until_stopped(work)


def find_images(given: tuple[pathlib.Path, ...]) -> tuple[list[pathlib.Path], list[str]]:
    """Lists the images given, those of a folder by their names.

    Returns:
      Their paths; and a line for each picture in a folder that is neither JPEG nor PNG.

    Raises:
      ValueError: something is not there, a folder holds none, or two have the same stem.
    """
    from jaxseg.data.folder import OTHER_SUFFIXES, SUFFIXES

    if not given:
        raise ValueError("name at least one image, or a folder of images, after the run")
    paths, passed_over = [], []
    for path in given:
        if not path.is_dir():
            if not path.exists():
                raise ValueError(f"{path}: no such file or folder")
            paths.append(path)
            continue
        there = [one for one in sorted(path.iterdir()) if not one.name.startswith(".") and one.is_file()]
        images = [one for one in there if one.suffix.lower() in SUFFIXES]
        if not images:
            raise ValueError(f"{path}: no JPEG or PNG images in it; name a folder of photographs")
        paths += images
        passed_over += [
            f"{one}: neither JPEG nor PNG; convert it" for one in there if one.suffix.lower() in OTHER_SUFFIXES
        ]
    first: dict[str, pathlib.Path] = {}
    for path in paths:
        if first.get(path.stem) == path:
            raise ValueError(f"{path} is given twice: name it once")
        if path.stem in first:
            raise ValueError(
                f"{first[path.stem]} and {path} have the same stem: their class maps would have the same name; rename"
                " one, or classify them into two folders"
            )
        first[path.stem] = path
    return paths, passed_over


def check_output(settings: Settings, paths: list[pathlib.Path]) -> None:
    """Raises ValueError if the output cannot be a folder, or a file would be replaced that must not be."""
    output = settings.output
    check_folder(output, "--output")
    images = {path.resolve() for path in paths}
    there = [target for path in paths for target in _targets(path, settings) if target.exists()]
    if read := [target for target in there if target.resolve() in images]:
        raise ValueError(f"--output {output}: {read[0]} is an image to be classified: name another folder")
    if there and not settings.overwrite:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise ValueError(f"there already: {there[0]}{more}; name another --output, or give --overwrite")


def _targets(path: pathlib.Path, settings: Settings) -> list[pathlib.Path]:
    """The files made of an image."""
    name = f"{path.stem}.png"
    return [settings.output / name, *([settings.output / "overlay" / name] if settings.overlay else [])]


def predict(
    classify: Any, manner: "Manner", labels: "Labels", paths: list[pathlib.Path], settings: Settings
) -> tuple[int, float]:
    """Reads, classifies and writes, all at the same time; names on stderr what cannot be read.

    Args:
      classify: from `make_classify`.
      manner: how it classifies.
      labels: the run's.
      paths: the images.
      settings: where to, and whether to draw.

    Returns:
      How many class maps were written, and the seconds that all took.

    Raises:
      OSError: a file cannot be written.
    """
    from tqdm import tqdm

    from experiments.results import missing_letters_once
    from jaxseg.data.threads import map_ahead

    began, written = time.perf_counter(), 0
    canvases = plan(paths, manner)
    read_one = functools.partial(read_and_prepare, manner=manner, canvases=canvases, keep=settings.overlay)
    bar = tqdm(total=len(paths), desc="classifying", unit="img", smoothing=0.1, disable=None)

    def images() -> Iterator[tuple[_Read, "Prepared"]]:
        for read in map_ahead(read_one, paths):
            if read.prepared is not None:
                yield read, read.prepared
                continue
            bar.write(f"skipped: {read.mistake}", file=sys.stderr)
            bar.update()

    with missing_letters_once(), bar, Writer(labels, settings) as writer:
        for read, classes in classify(images()):
            writer.put(read.path, read.image, classes)
            written += 1
            bar.update()
    return written, time.perf_counter() - began


def plan(paths: list[pathlib.Path], manner: "Manner") -> "dict[Size, Size]":
    """The canvases of the images, from their headers; those that cannot be read are left to `read_and_prepare`."""
    import numpy as np

    from jaxseg.data.images import UnreadableFileError, image_size
    from jaxseg.data.threads import map_ahead
    from jaxseg.manner import plan_canvases

    def find_size(path: pathlib.Path) -> "Size | None":
        try:
            return image_size(path)
        except UnreadableFileError:
            return None

    sizes = map_ahead(find_size, paths if manner.image_size is None else [])
    return plan_canvases(np.array([size for size in sizes if size]).reshape(-1, 2), manner)


def read_and_prepare(path: pathlib.Path, manner: "Manner", canvases: "dict[Size, Size]", keep: bool) -> _Read:
    """Reads an image and makes it ready; never raises for a file.

    Args:
      path: the file.
      manner: how it will be classified.
      canvases: from `plan`.
      keep: the image itself will be asked for: dozens wait at a time, and photographs are large.
    """
    from jaxseg.data.images import UnreadableFileError, read_image
    from jaxseg.manner import prepare

    try:
        image = read_image(path)
        return _Read(path, image if keep else None, prepare(image, manner, canvases))
    except UnreadableFileError as error:
        return _Read(path, mistake=str(error))
    except ValueError as error:  # larger than any image should be
        return _Read(path, mistake=f"{path}: {error}")


class Writer:
    """Writes class maps, and draws them, in threads.

    Args:
      labels: the class names and colours.
      settings: where to, and whether to draw.
    """

    def __init__(self, labels: "Labels", settings: Settings):
        self._labels, self._settings = labels, settings
        self._pool = concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 4))
        self._waiting: list[concurrent.futures.Future[None]] = []
        # matplotlib is not made for threads.
        self._drawing = threading.Lock()

    def __enter__(self) -> "Writer":
        """Begins."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits until all is written, unless something went wrong; raises OSError if that cannot be."""
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for future in self._waiting:
                future.result()

    def put(self, path: pathlib.Path, image: "np.ndarray | None", classes: "np.ndarray") -> None:
        """Writes what was made of an image, soon; waits where too much does; raises OSError for earlier ones."""
        self._waiting.append(self._pool.submit(self._write, path, image, classes))
        if len(self._waiting) > _WAITING:
            self._waiting.pop(0).result()

    def _write(self, path: pathlib.Path, image: Any, classes: "np.ndarray") -> None:
        from PIL import Image

        from jaxseg.files import replacing

        target, *drawn = _targets(path, self._settings)
        with replacing(target) as new:
            Image.fromarray(classes).save(new)
        for picture in drawn:
            from jaxseg import plots

            with self._drawing:
                plots.plot_overlay(image, classes, self._labels.names, self._labels.colours, picture)


if __name__ == "__main__":
    sys.exit(main())
