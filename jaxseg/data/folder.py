"""A data set in a folder: DIR/{train,val,test}/{img,seg}, an image and a label of the same stem for each example.

Images are JPEG or PNG of any size; labels are 8-bit grey or palette PNG whose values are the classes, 255 for ignored,
or what else `images.read_label` takes. `DIR/classes.txt` (see `labels.read_classes`) names the classes.
"""

import os
import pathlib
from collections.abc import Sequence

import numpy as np

from jaxseg.data.checks import raise_first
from jaxseg.data.images import label_size, read_image, read_label
from jaxseg.data.labels import Colour, Labels, name_classes, read_classes

_LAYOUT = "{train,val,test}/{img,seg}"
SUFFIXES = (".jpg", ".jpeg", ".png")
# Pictures in other formats would otherwise be passed over in silence.
OTHER_SUFFIXES = (".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif", ".heic", ".jp2", ".npy", ".ppm", ".pgm")


class FolderSource:
    """Random access to the examples of one split, decoded when asked for; safe to read from several threads.

    Attributes:
      names: the examples' stems, sorted.
      image_paths: a file for each name.
      label_paths: a file for each name.
      colours: of the classes; see `images.read_label`.
    """

    def __init__(
        self, image_paths: Sequence[pathlib.Path], label_paths: Sequence[pathlib.Path], colours: Sequence[Colour] = ()
    ):
        self.names = tuple(path.stem for path in image_paths)
        self.image_paths = tuple(image_paths)
        self.label_paths = tuple(label_paths)
        self.colours = tuple(colours)

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        """Decodes one example.

        Returns:
          {"image": (H, W, 3) uint8 RGB, upright, "label": (H, W) uint8, "name": the stem}.

        Raises:
          UnreadableFileError: a file cannot be read.
        """
        return {
            "image": read_image(self.image_paths[index]),
            "label": self.label(index),
            "name": self.names[index],
        }

    def label(self, index: int) -> np.ndarray:
        """Decodes one label alone: (H, W) uint8."""
        return read_label(self.label_paths[index], colours=self.colours)

    def label_sizes(self) -> np.ndarray:
        """(N, 2) int64: the height and width of each label in pixels, from the files' headers."""
        sizes = np.empty((len(self), 2), np.int64)
        for index, path in enumerate(self.label_paths):
            sizes[index] = label_size(path)
        return sizes

    def where(self, index: int) -> tuple[str, str]:
        """What messages call an example's image and its label."""
        return str(self.image_paths[index]), str(self.label_paths[index])


def open_folder(
    root: str | os.PathLike,
    num_classes: int | None = None,
    splits: Sequence[str] = ("train", "val", "test"),
    mistakes: list[str] | None = None,
) -> tuple[Labels, dict[str, FolderSource]]:
    """Finds the classes and the examples of a data set in a folder, without decoding any.

    Args:
      root: the folder.
      num_classes: needed where there is no `classes.txt`.
      splits: the splits to open; "test" is left out of the result if it does not exist.
      mistakes: takes what is wrong with the splits, instead of an error for the first one; they then hold what is left.

    Returns:
      The classes, and a source for each split.

    Raises:
      ValueError: something is missing, ambiguous or does not fit; the message names it and the remedy.
    """
    # A shell leaves the ~ of folder:~/pictures to us.
    root = pathlib.Path(os.path.expanduser(root))
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; expected a folder with {_LAYOUT} in it")
    labels = _open_classes(root, num_classes)
    sources = {}
    for split in splits:
        if split == "test" and len(splits) > 1 and not (root / split).exists():
            continue
        found: list[str] = []
        source = _open_split(root, split, labels.colours, found)
        if mistakes is None:
            raise_first(found)
        else:
            mistakes += found
        if source is not None:
            sources[split] = source
    return labels, sources


def _open_classes(root: pathlib.Path, num_classes: int | None) -> Labels:
    path = root / "classes.txt"
    if not path.exists():
        if num_classes is None:
            raise ValueError(f"{path}: no such file; write one class name per line in it, or give --num-classes")
        return name_classes(num_classes)
    labels = read_classes(path)
    if num_classes is not None and num_classes != labels.num_classes:
        raise ValueError(
            f"{path} names {labels.num_classes} classes, but --num-classes is {num_classes}:"
            " leave --num-classes out, or correct the file"
        )
    return labels


def _open_split(root: pathlib.Path, split: str, colours: Sequence[Colour], mistakes: list[str]) -> FolderSource | None:
    """Pairs the images and labels of one split; None where there are none."""
    image_folder, label_folder = root / split / "img", root / split / "seg"
    for folder in (image_folder, label_folder):
        if not folder.is_dir():
            mistakes.append(f"{folder}: no such folder; expected {root}/{_LAYOUT} with images in img, labels in seg")
            return None
    images, labels = _find_files(image_folder, mistakes), _find_files(label_folder, mistakes)
    mistakes += [
        f"{path}: a label must be a PNG, JPEG changes its values: save it as an 8-bit grey or palette PNG"
        for path in labels.values()
        if path.suffix.lower() in (".jpg", ".jpeg")
    ]
    for stem in sorted(images.keys() ^ labels.keys()):
        if stem in images:
            mistakes.append(f"{images[stem]}: an image without a label; add {label_folder / stem}.png or remove it")
        else:
            mistakes.append(f"{labels[stem]}: a label without an image; add {image_folder / stem}.jpg or remove it")
    stems = [
        stem
        for stem in sorted(images.keys() & labels.keys())
        if images[stem].suffix.lower() in SUFFIXES and labels[stem].suffix.lower() == ".png"
    ]
    if not stems:
        if not images:
            mistakes.append(f"{image_folder}: no JPEG or PNG images in it; put the {split} images there")
        return None
    return FolderSource([images[stem] for stem in stems], [labels[stem] for stem in stems], colours)


def _find_files(folder: pathlib.Path, mistakes: list[str]) -> dict[str, pathlib.Path]:
    """Maps stems to pictures, those in other formats too; hidden files and those that are none are passed over."""
    files: dict[str, pathlib.Path] = {}
    for path in sorted(folder.iterdir()):
        suffix = path.suffix.lower()
        if path.name.startswith(".") or suffix not in SUFFIXES + OTHER_SUFFIXES:
            continue
        if suffix in OTHER_SUFFIXES:
            mistakes.append(f"{path}: neither JPEG nor PNG; convert it")
        elif path.stem in files:
            mistakes.append(f"{path}: has the same stem as {files[path.stem].name}; rename or remove one of them")
        files[path.stem] = path
    return files
