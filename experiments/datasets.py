"""The data sets that every command takes with --dataset: what they are called, and from the name to the examples.

Imports no jax, and nothing else that takes long before a data set is opened, so that --help comes at once.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from jaxseg.data.labels import Labels

KINDS = ("shapes", "folder")
SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Which data set; the settings of every command that reads one have these options."""

    dataset: str = "shapes"
    """The data set: `shapes` (renders its own pictures), `shapes:small` (few and small ones, for trials) or
    `folder:DIR`, where DIR holds {train,val,test}/{img,seg} with a PNG label of the same stem for each image; test may
    be missing."""
    num_classes: int | None = None
    """Number of classes of a folder without a classes.txt (labels 0 to num_classes - 1; 255 is ignored)."""
    data_dir: pathlib.Path = pathlib.Path("data")
    """Where data sets that the program prepares itself are kept."""


def split_dataset(dataset: str) -> tuple[str, str]:
    """Splits --dataset into its kind, one of KINDS, and what follows the colon, or "".

    Raises:
      ValueError: there is no such data set.
    """
    kind, _, rest = dataset.partition(":")
    fits = rest if kind == "folder" else rest in ("", "small")
    if kind not in KINDS or not fits or dataset.endswith(":"):
        meant = f"folder:{dataset}" if pathlib.Path(dataset).is_dir() else "folder:DIR"
        raise ValueError(f"unknown --dataset {dataset!r}: use shapes or {meant}")
    return kind, rest


def short_name(dataset: str) -> str:
    """What folders of results are called after: the data set's name, or a folder's own."""
    kind, rest = split_dataset(dataset)
    return pathlib.Path(rest).resolve().name if kind == "folder" else dataset.replace(":", "-")


def check_options(options: DataOptions) -> None:
    """Raises ValueError where an option does not fit the data set or is out of range; looks at no file."""
    kind, _ = split_dataset(options.dataset)
    if kind != "folder" and options.num_classes is not None:
        raise ValueError(f"--num-classes is for folders: {kind} has its own classes")
    if options.num_classes is not None and not 2 <= options.num_classes <= 255:
        raise ValueError(f"--num-classes must be from 2 to 255, not {options.num_classes}")


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
    return dataclasses.replace(options, dataset=dataset, data_dir=pathlib.Path())


def find_data(options: DataOptions, splits: Sequence[str] = SPLITS) -> tuple["Labels", Callable[[], dict[str, Any]]]:
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
    check_options(options)
    kind, rest = split_dataset(options.dataset)
    if kind == "shapes":
        return _find_shapes(options, splits)
    from jaxseg.data import folder

    labels, sources = folder.open_folder(pathlib.Path(rest), options.num_classes, splits)

    def check_splits() -> dict[str, Any]:
        say_what_is_not_there(folder.check_folder(sources, labels.num_classes), labels)
        return sources

    return labels, check_splits


def _find_shapes(options: DataOptions, splits: Sequence[str]) -> tuple["Labels", Callable[[], dict[str, Any]]]:
    from jaxseg.data import shapes
    from jaxseg.data.labels import Labels, default_colours

    labels = Labels(shapes.NAMES, ((0, 0, 0), *default_colours(len(shapes.NAMES) - 1)))

    def open_splits() -> dict[str, Any]:
        small = split_dataset(options.dataset)[1] == "small"
        sources = shapes.open_shapes(options.data_dir, shapes.SMALL if small else None)
        return {split: sources[split] for split in splits}

    return labels, open_splits


def say_what_is_not_there(values: Mapping[str, "np.ndarray"], labels: "Labels") -> None:
    """Warns of classes that no training label shows; values: for each split the (256,) bool of its labels' values.

    Raises:
      ValueError: the labels of training or validation are ignored altogether.
    """
    for split in ("train", "val"):
        if split in values and not values[split][: labels.num_classes].any():
            raise ValueError(f"every pixel of the {split} labels is 255, which is ignored: save classes as 0, 1, ...")
    if "train" not in values:
        return
    there = values["train"].nonzero()[0].tolist()
    missing = [name for k, name in enumerate(labels.names) if k not in there]
    if missing:
        hint = ""
        if there == [0, 255]:
            hint = "; its labels hold only 0 and 255, which is ignored: save a mask's 255 as 1"
        print(f"warning: no label of the training split shows {', '.join(missing)}{hint}", file=sys.stderr)
