"""A data set in a folder: DIR/{train,val,test}/{img,seg}, an image and a label of the same stem for each example.

Images are JPEG or PNG of any size; labels are 8-bit grey or palette PNG whose values are the classes, 255 for ignored,
or what else `images.read_label` takes. `DIR/classes.txt` (see `labels.read_classes`) names the classes.
"""

import concurrent.futures
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from tqdm import tqdm

from jaxseg.data.images import label_size, read_image, read_label
from jaxseg.data.labels import IGNORE_LABEL, Colour, Labels, name_classes, read_classes

_LAYOUT = "{train,val,test}/{img,seg}"
_SUFFIXES = (".jpg", ".jpeg", ".png")
# Pictures in other formats would otherwise be passed over in silence.
_OTHER_SUFFIXES = (".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif", ".heic", ".jp2", ".npy", ".ppm", ".pgm")


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


def open_folder(
    root: str | os.PathLike, num_classes: int | None = None, splits: Sequence[str] = ("train", "val", "test")
) -> tuple[Labels, dict[str, FolderSource]]:
    """Finds the classes and the examples of a data set in a folder, without decoding any.

    Args:
      root: the folder.
      num_classes: needed where there is no `classes.txt`.
      splits: the splits to open; "test" is left out of the result if it does not exist.

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
        sources[split] = _open_split(root, split, labels.colours)
    return labels, sources


def check_folder(sources: Mapping[str, FolderSource], num_classes: int, progress: bool = True) -> dict[str, np.ndarray]:
    """Decodes every image and label once, so that a bad file is found before the training and not hours into it.

    Args:
      sources: the splits.
      num_classes: labels must be below it, or 255.
      progress: shows a progress bar on a terminal's standard error.

    Returns:
      For each split, which values occur in its labels: (256,) bool.

    Raises:
      ValueError: names the first bad file, in the order of the splits and of the names, and counts the others.
    """
    splits = [split for split, source in sources.items() for _ in range(len(source))]
    examples = [(source, index) for source in sources.values() for index in range(len(source))]
    bar = tqdm(total=len(examples), desc="checking the images", unit="img", leave=False, disable=not progress or None)
    with bar, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        mistakes, values = [], {split: np.zeros(256, bool) for split in sources}
        found = pool.map(lambda example: _look_at(example[0], example[1], num_classes), examples)
        for split, (mistake, occurring) in zip(splits, found, strict=True):
            bar.update()
            if mistake:
                mistakes.append(mistake)
            else:
                values[split] |= occurring
    _raise_first(mistakes)
    return values


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


def _open_split(root: pathlib.Path, split: str, colours: Sequence[Colour]) -> FolderSource:
    """Pairs the images and labels of one split."""
    image_folder, label_folder = root / split / "img", root / split / "seg"
    for folder in (image_folder, label_folder):
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; expected {root}/{_LAYOUT} with images in img, labels in seg")
    images, labels = _find_files(image_folder), _find_files(label_folder)
    mistakes = [
        f"{path}: a label must be a PNG, JPEG changes its values: save it as an 8-bit grey or palette PNG"
        for path in labels.values()
        if path.suffix.lower() != ".png"
    ]
    for stem in sorted(images.keys() ^ labels.keys()):
        if stem in images:
            mistakes.append(f"{images[stem]}: an image without a label; add {label_folder / stem}.png or remove it")
        else:
            mistakes.append(f"{labels[stem]}: a label without an image; add {image_folder / stem}.jpg or remove it")
    _raise_first(mistakes)
    if not images:
        raise ValueError(f"{image_folder}: no JPEG or PNG images in it; put the {split} images there")
    stems = sorted(images)
    return FolderSource([images[stem] for stem in stems], [labels[stem] for stem in stems], colours)


def _find_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Maps stems to image files; hidden files and those that are no images are passed over."""
    files: dict[str, pathlib.Path] = {}
    mistakes = []
    for path in sorted(folder.iterdir()):
        suffix = path.suffix.lower()
        if path.name.startswith("."):
            continue
        if suffix in _OTHER_SUFFIXES:
            mistakes.append(f"{path}: neither JPEG nor PNG; convert it")
        elif suffix in _SUFFIXES:
            if path.stem in files:
                mistakes.append(f"{path}: has the same stem as {files[path.stem].name}; rename or remove one of them")
            files[path.stem] = path
    _raise_first(mistakes)
    return files


def _look_at(source: FolderSource, index: int, num_classes: int) -> tuple[str | None, np.ndarray | None]:
    """What is wrong with one example, or None; and which values its label has: (256,) bool."""
    try:
        item = source[index]
    except ValueError as error:
        return str(error), None
    occurring = np.bincount(item["label"].ravel(), minlength=256) > 0
    return _find_mistake(source, index, item, num_classes), occurring


def _find_mistake(source: FolderSource, index: int, item: dict, num_classes: int) -> str | None:
    image_path, label_path = source.image_paths[index], source.label_paths[index]
    (height, width), (label_height, label_width) = item["image"].shape[:2], item["label"].shape
    if (height, width) != (label_height, label_width):
        return (
            f"{label_path}: is {label_width}x{label_height} (width x height), but its image {image_path}, upright, is"
            f" {width}x{height}; make them the same size"
        )
    outside = (item["label"] >= num_classes) & (item["label"] != IGNORE_LABEL)
    if outside.any():
        value = item["label"][outside].max()
        return (
            f"{label_path}: has the value {value}, outside 0..{num_classes - 1} (255 is ignored);"
            " correct the label, or give all classes in classes.txt or --num-classes"
        )
    return None


def _raise_first(mistakes: Sequence[str]) -> None:
    if mistakes:
        raise ValueError(mistakes[0] + (f" (the first of {len(mistakes)} mistakes)" if len(mistakes) > 1 else ""))
