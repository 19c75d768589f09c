"""A VOCdevkit and an SBD of a few small pictures, in the formats and the layout of the real ones."""

import pathlib
import tarfile

import numpy as np
from PIL import Image
from scipy import sparse
from scipy.io import savemat

# By the image's name, the VOC classes (0 to 20) it shows.
TRAIN = {"2007_000001": (15,), "2007_000002": (10, 17), "2007_000003": (1, 9)}
VAL = {f"2008_00000{k}": classes for k, classes in enumerate([(12,), (8, 15), (2,), (20,), (6,), (13, 7)])}
SBD = {"2009_000001": (7,), "2009_000002": (5,), "2008_000000": (12,), "2007_000003": (9,)}


def size(name: str) -> tuple[int, int]:
    """Height and width: each picture has its own."""
    return 20 + int(name[-1]), 30 - int(name[3])


def label(name: str, classes: tuple[int, ...], border: bool = True) -> np.ndarray:
    """Upright stripes of the classes, (H, W) uint8, with a border of 255 between them as VOC has."""
    height, width = size(name)
    stripes = np.zeros((height, width), np.uint8)
    for k, value in enumerate(classes):
        stripes[4:, 5 + 8 * k : 11 + 8 * k] = value
    if border:
        edge = np.diff(stripes, axis=1, prepend=0) != 0
        stripes[edge] = 255
    return stripes


def image(name: str) -> np.ndarray:
    """Noise, (H, W, 3) uint8."""
    seed = [int(part) for part in name.split("_")]
    return np.random.default_rng(seed).integers(0, 256, (*size(name), 3), np.uint8)


def palette() -> list[int]:
    """VOC's colours: the bits of a class's number, in turns, are the upper bits of red, green and blue."""
    return [
        sum((k >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)) for k in range(256) for channel in range(3)
    ]


def save_label(path: pathlib.Path, values: np.ndarray) -> None:
    """A palette PNG, as VOC's are."""
    picture = Image.fromarray(values, "L").convert("P")
    picture.putdata(values.ravel().tolist())
    picture.putpalette(palette())
    picture.save(path)


def save_annotation(path: pathlib.Path, values: np.ndarray) -> None:
    """A MATLAB struct, as SBD's are."""
    present = np.unique(values[values > 0])
    boundaries = np.empty((20, 1), object)
    for k in range(20):
        boundaries[k, 0] = sparse.csc_matrix(np.diff(values == k + 1, axis=1, prepend=False).astype(float))
    fields = {"Boundaries": boundaries, "Segmentation": values, "CategoriesPresent": present[:, None]}
    savemat(path, {"GTcls": fields}, do_compression=True)


def write(root: pathlib.Path) -> None:
    """Writes root/VOCdevkit and root/benchmark_RELEASE."""
    voc, sbd = root / "VOCdevkit/VOC2012", root / "benchmark_RELEASE/dataset"
    for folder in ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass", "SegmentationObject"):
        (voc / folder).mkdir(parents=True)
    for folder in ("cls", "img"):
        (sbd / folder).mkdir(parents=True)
    for name in {**TRAIN, **VAL, **SBD}:
        Image.fromarray(image(name)).save(voc / f"JPEGImages/{name}.jpg", quality=95)
    for split, names in (("train", TRAIN), ("val", VAL), ("trainval", {**TRAIN, **VAL})):
        (voc / f"ImageSets/Segmentation/{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for name, classes in names.items():
            save_label(voc / f"SegmentationClass/{name}.png", label(name, classes))
    for name, classes in SBD.items():
        save_annotation(sbd / f"cls/{name}.mat", label(name, classes, border=False))
        (sbd / f"img/{name}.jpg").write_bytes((voc / f"JPEGImages/{name}.jpg").read_bytes())
    (sbd / "cls/.DS_Store").write_bytes(b"of a file manager")
    (sbd / "train.txt").write_text("".join(f"{name}\n" for name in SBD))


def pack(root: pathlib.Path, folder: pathlib.Path) -> None:
    """Packs what `write` wrote into VOC's and SBD's archives in a folder."""
    with tarfile.open(folder / "VOCtrainval_11-May-2012.tar", "w") as archive:
        archive.add(root / "VOCdevkit", "VOCdevkit")
    with tarfile.open(folder / "benchmark.tgz", "w:gz") as archive:
        archive.add(root / "benchmark_RELEASE", "benchmark_RELEASE")
