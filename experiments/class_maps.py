"""A folder of class maps, whoever made them: a PNG of class indices for each image, of its stem and size."""

import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxseg.data.labels import Labels

# How many files a message names of each kind.
_NAMED = 5


class UnfitError(ValueError):
    """Class maps of a folder that do not belong to the images: which, in one line."""


def find_class_maps(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """The class maps in a folder, by their stems.

    Raises:
      ValueError: there are none, or no folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder: name the workdir of a run, or a folder of class maps")
    paths = [path for path in sorted(folder.iterdir()) if path.suffix.lower() == ".png" and path.is_file()]
    maps = {path.stem: path for path in paths if not path.name.startswith(".")}
    if not maps:
        raise ValueError(f"{folder} is neither the workdir of a run nor a folder with PNG class maps in it")
    return maps


def read_class_maps(
    folder: pathlib.Path, maps: dict[str, pathlib.Path], labels: "Labels", source: Any
) -> Iterator[tuple[int, dict[str, Any], Any]]:
    """Gives the index, the example and the class map of each image.

    Raises:
      UnfitError: at the end, if class maps are missing, cannot be read, or do not fit; it names them.
    """
    from jaxseg.data.images import UnreadableFileError, read_label
    from jaxseg.data.threads import map_ahead

    missing, unfit, names = [], [], set()

    def read(index: int) -> tuple[int, dict[str, Any], Any, str]:
        item = source[index]
        if item["name"] not in maps:
            return index, item, None, ""
        path = maps[item["name"]]
        try:
            classes = read_label(path, colours=labels.colours)
        except UnreadableFileError as error:
            return index, item, None, str(error)
        if classes.shape != item["label"].shape:
            sizes = ["x".join(map(str, shape[::-1])) for shape in (classes.shape, item["label"].shape)]
            return index, item, None, f"{path.name} is {sizes[0]} (width x height), its image {sizes[1]}"
        if (most := classes[item["label"] != 255].max(initial=0)) >= labels.num_classes:
            return (
                index,
                item,
                None,
                f"{path.name} has the value {most}, and the classes end at {labels.num_classes - 1}",
            )
        return index, item, classes, ""

    for index, item, classes, mistake in map_ahead(read, range(len(source))):
        names.add(item["name"])
        if classes is not None:
            yield index, item, classes
        elif mistake:
            unfit.append(mistake)
        else:
            missing.append(f"{item['name']}.png")
    if extra := sorted(maps.keys() - names):
        what = f"{len(extra)} class maps are" if len(extra) > 1 else "1 class map is"
        print(f"warning: {folder}: {what} of no image: {_name(maps[stem].name for stem in extra)}", file=sys.stderr)
    if missing or unfit:
        parts = [f"{len(missing)} of {len(source)} missing: {_name(missing)}"] if missing else []
        raise UnfitError(f"{folder}: {'; '.join([*parts, _name(unfit)] if unfit else parts)}; nothing was scored")


def _name(files: Iterable[str]) -> str:
    """The first of them, and how many more there are."""
    files = list(files)
    more = f" and {len(files) - _NAMED} more" if len(files) > _NAMED else ""
    return ", ".join(files[:_NAMED]) + more
