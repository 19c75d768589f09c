"""The data sets that every command takes with --dataset: what they are called, and from the name to the examples.

Imports no jax, and nothing else that takes long before a data set is opened, so that --help comes at once.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.arguments import quick_arguments

if TYPE_CHECKING:
    import numpy as np

    from jaxseg.data.labels import Labels

KINDS = ("shapes", "folder", "voc9", "camvid", "tfds")
# The classes of a data set, and what opens its splits: {split: source}.
Found = tuple["Labels", Callable[[], dict[str, Any]]]
SPLITS = ("train", "val", "test")
# The kinds that need a colon and a name after it.
_NAMED = ("folder", "tfds")
_FOR_TFDS = ("image_key", "label_key", "label_offset", "label_ignore", "splits")


@dataclasses.dataclass(frozen=True)
@quick_arguments
class DataOptions:
    """Which data set; the settings of every command that reads one have these options."""

    dataset: str = "shapes"
    """The data set: `shapes` (renders its own pictures) or `shapes:small` (few and small ones, for trials);
    `folder:DIR`, where DIR holds {train,val,test}/{img,seg} with a PNG label of the same stem for each image, and test
    may be missing; `voc9` (the report's nine classes of PASCAL VOC 2012) and `camvid` (the SegNet protocol), which are
    downloaded, or made from what is in --manual-dir; or `tfds:NAME` or `tfds:NAME/CONFIG`, with or without `:VERSION`,
    which TFDS has prepared in --data-dir."""
    num_classes: int | None = None
    """Number of classes of a folder without a classes.txt (labels 0 to num_classes - 1; 255 is ignored), or of a data
    set of TFDS that does not say it."""
    data_dir: pathlib.Path = pathlib.Path("data")
    """Where data sets that the program prepares itself are kept, and downloads; TFDS's folder for tfds:NAME."""
    manual_dir: pathlib.Path | None = None
    """A folder with the archives of voc9 or camvid, or with what was in them."""
    skip_bad: bool = False
    """Leave out, and list, the images of voc9 and camvid that cannot be read; otherwise the first one is named."""
    image_key: str = "image"
    """What the image is called in a data set of TFDS."""
    label_key: str = "label"
    """What the label is called there, such as segmentation_mask."""
    label_offset: int = 0
    """What is added to its values: -1 where the classes are numbered from 1."""
    label_ignore: tuple[int, ...] = (255,)
    """Its values, before that, that are ignored."""
    splits: tuple[str, ...] | None = None
    """What of a data set of TFDS to use for training, validation and, if it is given, test, if not its train,
    validation and test: splits, or slices such as 'train[:90%]'."""


def split_dataset(dataset: str) -> tuple[str, str]:
    """Splits --dataset into its kind, one of KINDS, and what follows the colon, or "".

    Raises:
      ValueError: there is no such data set.
    """
    kind, _, rest = dataset.partition(":")
    fits = rest if kind in _NAMED else dataset in (*KINDS, "shapes:small")
    if kind not in KINDS or not fits:
        meant = f"folder:{dataset}" if pathlib.Path(dataset).is_dir() else "folder:DIR"
        raise ValueError(f"unknown --dataset {dataset!r}: use shapes, {meant}, voc9, camvid or tfds:NAME")
    return kind, rest


def short_name(dataset: str) -> str:
    """What folders of results are called after: the data set's name, or a folder's own."""
    kind, rest = split_dataset(dataset)
    if kind == "folder":
        return pathlib.Path(rest).resolve().name
    return dataset.removeprefix("tfds:").replace(":", "-").replace("/", "-")


def check_options(options: DataOptions) -> None:
    """Raises ValueError where an option does not fit the data set or is out of range; looks at no file."""
    kind, _ = split_dataset(options.dataset)
    if kind not in _NAMED and options.num_classes is not None:
        raise ValueError(f"--num-classes is for folders and tfds: {kind} has its own classes")
    if options.num_classes is not None and not 2 <= options.num_classes <= 255:
        raise ValueError(f"--num-classes must be from 2 to 255, not {options.num_classes}")
    defaults = DataOptions()
    needed = dict.fromkeys(_FOR_TFDS, "tfds:NAME") | {"manual_dir": "voc9 and camvid", "skip_bad": "voc9 and camvid"}
    for name, kinds in needed.items():
        if kind not in kinds.replace(":", " ").split() and getattr(options, name) != getattr(defaults, name):
            raise ValueError(f"--{name.replace('_', '-')} is for {kinds}, not for {kind}")
    if options.splits is not None and len(options.splits) not in (2, 3):
        raise ValueError(f"--splits: give two or three, for training, validation and test, not {len(options.splits)}")
    if not all(0 <= value <= 255 for value in options.label_ignore):
        raise ValueError(f"--label-ignore must be from 0 to 255, not {options.label_ignore}")
    if not -255 <= options.label_offset <= 255:
        raise ValueError(f"--label-offset must be from -255 to 255, not {options.label_offset}")


def options_of(settings: Mapping[str, Any]) -> DataOptions:
    """The options by which a run found its data, from its settings as JSON has them."""
    values = {field.name: settings[field.name] for field in dataclasses.fields(DataOptions) if field.name in settings}
    for name, value in values.items():
        if name.endswith("_dir") and value is not None:
            values[name] = pathlib.Path(value)
        elif isinstance(value, list):
            values[name] = tuple(value)
    return DataOptions(**values)


def same_data(options: DataOptions) -> DataOptions:
    """The options without what names the same data differently: two are of the same data where these are equal."""
    kind, rest = split_dataset(options.dataset)
    dataset = f"folder:{pathlib.Path(rest).expanduser().resolve()}" if kind == "folder" else options.dataset
    manual_dir = options.manual_dir and options.manual_dir.expanduser().resolve()
    return dataclasses.replace(options, dataset=dataset, data_dir=pathlib.Path(), manual_dir=manual_dir)


def find_data(options: DataOptions, splits: Sequence[str] = SPLITS) -> Found:
    """Finds a data set: its classes, at once, and a function that opens its splits.

    That function renders the pictures, or looks at every file of the splits, which can take minutes.

    Args:
      options: which data set.
      splits: those to open; without a "test" split it is left out, unless it is asked for alone.

    Returns:
      The classes; and a function without arguments, which returns {split: source}, each as
      `jaxseg.data.loader.Source` says.

    Raises:
      ValueError: something is missing or does not fit; the message is one line for the user. The function too.
      OSError: a file or folder cannot be read. The function too.
    """
    labels, open_splits = find_unchecked(options, splits)
    kind, _ = split_dataset(options.dataset)
    if kind not in _NAMED:  # what we have prepared ourselves is right
        return labels, open_splits

    def check_splits() -> dict[str, Any]:
        from jaxseg.data.checks import check_sources

        sources = open_splits()
        if warning := find_absent(check_sources(sources, labels.num_classes), labels):
            print(f"warning: {warning}", file=sys.stderr)
        return sources

    return labels, check_splits


def find_unchecked(options: DataOptions, splits: Sequence[str] = SPLITS, mistakes: list[str] | None = None) -> Found:
    """As `find_data`, but its function looks at no example.

    Args:
      options: which data set.
      splits: those to open.
      mistakes: takes what is wrong with a folder's files, instead of an error for the first one.
    """
    check_options(options)
    kind, rest = split_dataset(options.dataset)
    if kind == "folder":
        from jaxseg.data.folder import open_folder

        labels, sources = open_folder(pathlib.Path(rest), options.num_classes, splits, mistakes)
        return labels, lambda: dict(sources)
    return _FINDERS[kind](options, rest, splits)


def _find_shapes(options: DataOptions, rest: str, splits: Sequence[str]) -> Found:
    from jaxseg.data import shapes
    from jaxseg.data.labels import Labels, default_colours

    labels = Labels(shapes.NAMES, ((0, 0, 0), *default_colours(len(shapes.NAMES) - 1)))
    config = shapes.SMALL if rest == "small" else None
    return labels, lambda: _choose(shapes.open_shapes(options.data_dir, config), splits)


def _find_voc9(options: DataOptions, _: str, splits: Sequence[str]) -> Found:
    from jaxseg.data import voc9
    from jaxseg.data.labels import VOC9

    sources = voc9.find_sources(options.manual_dir)
    return VOC9, lambda: _choose(voc9.open_voc9(options.data_dir, sources, options.skip_bad), splits)


def _find_camvid(options: DataOptions, _: str, splits: Sequence[str]) -> Found:
    from jaxseg.data import camvid
    from jaxseg.data.labels import CAMVID

    source = camvid.find_source(options.manual_dir)
    return CAMVID, lambda: _choose(camvid.open_camvid(options.data_dir, source, options.skip_bad), splits)


def _find_tfds(options: DataOptions, rest: str, splits: Sequence[str]) -> Found:
    from jaxseg.data import prepared, records

    builder = prepared.find_prepared(options.data_dir, rest)
    image, label, offset = options.image_key, options.label_key, options.label_offset
    labels = prepared.name_labels(builder, image, label, offset, options.num_classes)
    names = _choose(prepared.name_splits(builder, options.splits), splits)
    sources = {
        split: records.RecordSource(
            builder, name, image_key=image, label_key=label, offset=offset, ignored=options.label_ignore
        )
        for split, name in names.items()
    }
    return labels, lambda: dict(sources)


def _choose(sources: Mapping[str, Any], splits: Sequence[str]) -> dict[str, Any]:
    """Some of the splits; raises ValueError if one is missing, unless it is the test split among others."""
    for split in splits:
        if split not in sources and (split != "test" or len(splits) == 1):
            raise ValueError(f"the data set has no {split} split, only {', '.join(sources)}")
    return {split: sources[split] for split in splits if split in sources}


_FINDERS = {
    "shapes": _find_shapes,
    "voc9": _find_voc9,
    "camvid": _find_camvid,
    "tfds": _find_tfds,
}


def find_absent(values: Mapping[str, "np.ndarray"], labels: "Labels") -> str | None:
    """Says which classes no training label shows; values: for each split the (256,) bool of its labels' values.

    Raises:
      ValueError: the labels of training or validation are ignored altogether.
    """
    for split in ("train", "val"):
        if split in values and not values[split][: labels.num_classes].any():
            raise ValueError(f"every pixel of the {split} labels is 255, which is ignored: save classes as 0, 1, ...")
    there = values["train"].nonzero()[0].tolist() if "train" in values else range(labels.num_classes)
    missing = [name for k, name in enumerate(labels.names) if k not in there]
    if not missing:
        return None
    only = "; its labels hold only 0 and 255, which is ignored: save a mask's 255 as 1" if there == [0, 255] else ""
    return f"no label of the training split shows {', '.join(missing)}{only}"
