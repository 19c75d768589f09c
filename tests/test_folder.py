"""The data set in a folder: what is read, against Pillow and hand-made files, and each user's mistake as one line."""

import concurrent.futures
import pathlib
import re
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from jaxseg.data import checks, folder
from jaxseg.data.labels import default_colours


def save(path: pathlib.Path, array: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def root(tmp_path) -> pathlib.Path:
    """Three splits of three examples of different sizes, with labels 0 to 3 and 255."""
    for split in ("train", "val", "test"):
        for k, name in enumerate(("a", "b.1", "c")):
            height, width = 12 + k, 20 - k
            label = np.random.default_rng(k).choice([0, 1, 2, 3, 255], (height, width)).astype(np.uint8)
            save(tmp_path / split / "img" / f"{name}.{'JPG' if k == 0 else 'png'}", random_image(height, width, k))
            save(tmp_path / split / "seg" / f"{name}.png", label)
    return tmp_path


def test_open_folder_reads_what_was_written(root):
    (root / "train/img/.DS_Store").write_text("hidden")
    (root / "train/img/notes.txt").write_text("no image")
    (root / "train/img/._a.jpg").write_text("hidden")
    labels, sources = folder.open_folder(root, num_classes=4)
    checks.check_sources(sources, 4, progress=False)
    assert labels.names == ("class 0", "class 1", "class 2", "class 3") and labels.colours == default_colours(4)
    assert list(sources) == ["train", "val", "test"]
    source = sources["train"]
    assert len(source) == 3 and source.names == ("a", "b.1", "c")
    assert source.label_sizes().tolist() == [[12, 20], [13, 19], [14, 18]]
    item = source[np.int64(1)]
    assert item["name"] == "b.1"
    assert item["image"].dtype == np.uint8 and item["label"].dtype == np.uint8
    np.testing.assert_array_equal(item["image"], random_image(13, 19, 1))
    expected = np.random.default_rng(1).choice([0, 1, 2, 3, 255], (13, 19))
    np.testing.assert_array_equal(item["label"], expected)
    np.testing.assert_array_equal(source[0]["image"], np.asarray(Image.open(root / "train/img/a.JPG")))
    with pytest.raises(IndexError):
        source[3]


def test_splits_and_names(root):
    (root / "classes.txt").write_text("w\nx\ny #010203\nz\n")
    shutil.rmtree(root / "test")
    labels, sources = folder.open_folder(root)
    assert labels.names == ("w", "x", "y", "z") and labels.colours[2] == (1, 2, 3)
    assert list(sources) == ["train", "val"]
    assert folder.open_folder(root, num_classes=4, splits=("val",))[0] == labels
    with pytest.raises(ValueError, match="test/img: no such folder"):  # asked for by name alone, it must be there
        folder.open_folder(root, splits=("test",))


def test_reading_from_threads(root):
    source = folder.open_folder(root, num_classes=4)[1]["train"]
    expected = [source[i] for i in range(3)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for i, item in zip(range(300), pool.map(lambda i: source[i % 3], range(300)), strict=True):
            np.testing.assert_array_equal(item["image"], expected[i % 3]["image"])
            np.testing.assert_array_equal(item["label"], expected[i % 3]["label"])


def bomb(side: int) -> bytes:
    """A PNG of a few bytes whose header promises `side` x `side` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def set_exif_orientation(path: pathlib.Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path, exif=exif)


ZEROS = np.zeros((12, 20), np.uint8)

# What the user did, the file at fault, and what the line says about it.
MISTAKES = {
    "no folder": (lambda r: shutil.rmtree(r), "", "no such folder; expected a folder with {train,val,test}/{img,seg}"),
    "no train": (lambda r: shutil.rmtree(r / "train"), "train/img", "no such folder; expected"),
    "no val": (lambda r: shutil.rmtree(r / "val"), "val/img", "no such folder; expected"),
    "no seg": (lambda r: shutil.rmtree(r / "val/seg"), "val/seg", "no such folder; expected"),
    "test without labels": (lambda r: shutil.rmtree(r / "test/seg"), "test/seg", "no such folder; expected"),
    "no label": (lambda r: (r / "val/seg/b.1.png").unlink(), "val/img/b.1.png", "an image without a label; add"),
    "no image": (lambda r: (r / "val/img/b.1.png").unlink(), "val/seg/b.1.png", "a label without an image; add"),
    "empty split": (
        lambda r: [path.unlink() for path in r.glob("train/*/*")],
        "train/img",
        "no JPEG or PNG images in it; put the train images there",
    ),
    "same stem": (
        lambda r: shutil.copy(r / "train/img/a.JPG", r / "train/img/a.png"),
        "train/img/a.png",
        "has the same stem as a.JPG; rename or remove one of them",
    ),
    "other format": (
        lambda r: (r / "train/img/a.JPG").rename(r / "train/img/a.webp"),
        "train/img/a.webp",
        "neither JPEG nor PNG; convert it",
    ),
    "JPEG label": (
        lambda r: save(r / "train/seg/a.jpg", ZEROS) or (r / "train/seg/a.png").unlink(),
        "train/seg/a.jpg",
        "a label must be a PNG, JPEG changes its values",
    ),
    "JPEG label named PNG": (
        lambda r: save(r / "train/seg/a.png", ZEROS, format="JPEG"),
        "train/seg/a.png",
        "its content is not PNG; convert, replace or remove it",
    ),
    "RGB label": (
        lambda r: save(r / "val/seg/c.png", random_image(14, 18)),
        "val/seg/c.png",
        "the label has the colour #5f82c2 in row 0, column 0, which is not that of one class; save the class of each",
    ),
    "16-bit label": (
        lambda r: save(r / "val/seg/c.png", np.full((14, 18), 1000, np.uint16)),
        "val/seg/c.png",
        "the label has the 16-bit value 1000; save the class of each pixel as one 8-bit value",
    ),
    "label out of range": (
        lambda r: save(r / "val/seg/a.png", ZEROS + 4),
        "val/seg/a.png",
        "has the value 4, outside 0..3 (255 is ignored); correct the label, or give all classes in",
    ),
    "sizes differ": (
        lambda r: save(r / "val/seg/a.png", ZEROS[:6, :10]),
        "val/seg/a.png",
        "is 10x6 (width x height), but its image {root}/val/img/a.JPG, upright, is 20x12; make them the same size",
    ),
    "sizes differ once upright": (
        lambda r: set_exif_orientation(r / "val/img/a.JPG"),
        "val/seg/a.png",
        "is 20x12 (width x height), but its image {root}/val/img/a.JPG, upright, is 12x20; make them the same size",
    ),
    "truncated JPEG": (lambda r: truncate(r / "val/img/a.JPG"), "val/img/a.JPG", "cannot be read (image file is trunc"),
    "truncated PNG": (lambda r: truncate(r / "val/img/c.png"), "val/img/c.png", "cannot be read ("),
    "truncated label": (lambda r: truncate(r / "val/seg/c.png"), "val/seg/c.png", "cannot be read ("),
    "no image at all": (
        lambda r: (r / "val/img/a.JPG").write_text("oops"),
        "val/img/a.JPG",
        "its content is not JPEG or PNG; convert, replace or remove it",
    ),
    "empty file": (lambda r: (r / "val/img/a.JPG").write_bytes(b""), "val/img/a.JPG", "its content is not JPEG or PNG"),
    "bomb": (
        lambda r: (r / "val/img/c.png").write_bytes(bomb(60000)),
        "val/img/c.png",
        "cannot be read (Image size (3600000000 pixels) exceeds limit",
    ),
    "small bomb": (
        lambda r: (r / "val/seg/c.png").write_bytes(bomb(9000)),
        "val/seg/c.png",
        "cannot be read (66 bytes hold no 9000 x 9000 pixels); replace or remove it",
    ),
}


def open_and_check(root: pathlib.Path, num_classes: int | None = 4) -> None:
    labels, sources = folder.open_folder(root, num_classes)
    checks.check_sources(sources, labels.num_classes)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(root, mistake, capfd):
    open_and_check(root)
    break_it, path, message = MISTAKES[mistake]
    break_it(root)
    with pytest.raises(ValueError, match=re.escape(message.replace("{root}", str(root)))) as error:
        open_and_check(root)
    text = str(error.value)
    assert text.startswith(f"{root / path}: ") and "\n" not in text and "mistakes)" not in text
    assert capfd.readouterr() == ("", "")  # and no progress bar where no terminal is


def test_the_first_mistake_is_named_and_the_others_counted(root):
    truncate(root / "val/img/c.png")
    save(root / "test/seg/a.png", ZEROS + 9)
    save(root / "val/seg/b.1.png", ZEROS)
    truncate(root / "train/seg/c.png")
    with pytest.raises(ValueError, match=re.escape(f"{root}/train/seg/c.png: ")) as error:
        open_and_check(root)
    assert str(error.value).endswith("(the first of 4 mistakes)")
    for name in ("b.1", "c"):
        (root / f"val/seg/{name}.png").unlink()
    with pytest.raises(ValueError, match=re.escape(f"{root}/val/img/b.1.png: ")) as error:
        open_and_check(root)
    assert str(error.value).endswith("(the first of 2 mistakes)")


def test_the_number_of_classes_must_be_known_and_agree(root):
    with pytest.raises(ValueError, match=r"classes.txt: no such file; write .* or give --num-classes$"):
        open_and_check(root, None)
    (root / "classes.txt").write_text("a\nb\nc\nd\n")
    open_and_check(root, None)
    with pytest.raises(
        ValueError, match=r"classes.txt names 4 classes, but --num-classes is 5: leave --num-classes out"
    ):
        open_and_check(root, 5)


def test_camvid(shared):
    _, sources = folder.open_folder(shared / "data" / "camvid", num_classes=11)
    assert [len(source) for source in sources.values()] == [367, 101, 233]
    assert (sources["test"].label_sizes() == (360, 480)).all()
    item = sources["train"][0]
    assert item["image"].shape == (360, 480, 3) and item["label"].shape == (360, 480)
    assert set(np.unique(item["label"])) <= {*range(11), 255}


def test_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError) as error:
        folder.open_folder("~/pictures", 2)
    assert str(error.value).startswith(f"{tmp_path}/pictures: no such folder")
