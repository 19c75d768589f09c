"""What is said of a data set before training: the numbers, and each thing that is wrong with it."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from experiments import check_data
from jaxseg.data import shapes


def save(path: pathlib.Path, array: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


@pytest.fixture
def root(tmp_path) -> pathlib.Path:
    """Noise of two sizes; class 0 everywhere, class 1 in some training images, class 2 in validation alone."""
    root = tmp_path / "pictures"
    for number, (split, count) in enumerate((("train", 4), ("val", 2), ("test", 1))):
        for k in range(count):
            label = np.zeros((8, 10 + k % 2), np.uint8)
            label[0] = 255
            label[1, : 5 * k] = 1 + number
            save(
                root / split / "img" / f"{k}.png",
                np.random.default_rng([number, k]).integers(0, 256, (*label.shape, 3), np.uint8),
            )
            save(root / split / "seg" / f"{k}.png", label)
    (root / "classes.txt").write_text("ground #000000\nroof\ntree\nwell\n")
    return root


def run(root, tmp_path, capsys, *options):
    """Checks the folder; returns the exit code, the report, and what was printed."""
    code = check_data.main(["--dataset", f"folder:{root}", "--output", str(tmp_path / "out"), *options])
    out, err = capsys.readouterr()
    report = tmp_path / "out" / "check.json"
    return code, json.loads(report.read_text()) if report.exists() else None, out + err


def test_a_good_folder_is_counted(root, tmp_path, capsys):
    code, report, said = run(root, tmp_path, capsys, "--images", "5")
    assert code == 0 and "nothing is wrong" in said and report["mistakes"] == []
    assert report["images"] == {"train": 4, "val": 2, "test": 1}
    assert report["sizes"]["train"] == [[8, 10, 2], [8, 11, 2]] and report["sizes"]["test"] == [[8, 10, 1]]
    labels = {
        split: [np.array(Image.open(path)) for path in (root / split / "seg").iterdir()] for split in report["images"]
    }
    for k, name in enumerate(("ground", "roof", "tree", "well")):
        for split, arrays in labels.items():
            assert report["classes"][name]["pixels"][split] == sum(int((array == k).sum()) for array in arrays)
            assert report["classes"][name]["images"][split] == sum(bool((array == k).any()) for array in arrays)
    assert report["ignored_pixels"]["val"] == 10 + 11
    # The definition, with one image after the other: of the labelled pixels of the images that show a class.
    shares = []
    for k in (0, 1):
        showing = [array[array != 255] for array in labels["train"] if (array == k).any()]
        shares.append(sum((array == k).sum() for array in showing) / sum(array.size for array in showing))
    weights = [report["classes"][name]["weight"] for name in ("ground", "roof")]
    np.testing.assert_allclose(weights, np.median(shares) / np.array(shares))
    assert report["classes"]["well"]["weight"] is None
    assert report["notes"] == ["no label of the training split shows tree, well"] and "note: no label" in said
    assert "2 sizes, 8 to 8 x 10 to 11; 2 are 8x10" in said
    assert "class #1  roof" in said and Image.open(tmp_path / "out" / "contact.png").width > 1000


def damage(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


ZEROS = np.zeros((8, 10), np.uint8)
TEN_WAYS = {
    "an unreadable image": (lambda r: damage(r / "train/img/0.png"), ["train/img/0.png: cannot be read"]),
    "an unreadable label": (lambda r: damage(r / "val/seg/1.png"), ["val/seg/1.png: cannot be read"]),
    "both": (
        lambda r: (damage(r / "val/img/1.png"), damage(r / "val/seg/1.png")),
        ["val/img/1.png: cannot be read", "val/seg/1.png: cannot be read"],
    ),
    "a value out of range": (
        lambda r: save(r / "train/seg/0.png", ZEROS + 4),
        ["train/seg/0.png: has the value 4"],
    ),
    "a value out of range beside a bad image": (
        lambda r: (save(r / "train/seg/0.png", ZEROS + 4), damage(r / "train/img/0.png")),
        ["train/img/0.png: cannot be read", "train/seg/0.png: has the value 4, outside 0..3"],
    ),
    "another size": (
        lambda r: save(r / "test/seg/0.png", ZEROS[:4]),
        ["test/seg/0.png: is 10x4 (width x height), but"],
    ),
    "another size and a value out of range": (
        lambda r: save(r / "test/seg/0.png", ZEROS[:4] + 9),
        ["test/seg/0.png: is 10x4 (width x height), but", "test/seg/0.png: has the value 9, outside"],
    ),
    "missing and extra": (
        lambda r: ((r / "train/seg/0.png").unlink(), (r / "train/img/1.png").unlink()),
        ["train/img/0.png: an image without a label", "train/seg/1.png: a label without an image"],
    ),
    "another format": (
        lambda r: (r / "train/img/0.png").rename(r / "train/img/0.bmp"),
        ["train/img/0.bmp: neither JPEG nor PNG; convert it"],
    ),
    "the same stem": (
        lambda r: shutil.copy(r / "train/img/0.png", r / "train/img/0.jpeg"),
        ["train/img/0.png: has the same stem as 0.jpeg"],
    ),
    "a label as JPEG": (
        lambda r: (save(r / "val/seg/0.jpg", ZEROS), (r / "val/seg/0.png").unlink()),
        ["val/seg/0.jpg: a label must be a PNG"],
    ),
    "the same picture": (
        lambda r: shutil.copy(r / "train/img/2.png", r / "test/img/0.png"),
        ["train/img/2.png: the same picture as {root}/test/img/0.png; keep it in one split"],
    ),
    "no validation": (lambda r: shutil.rmtree(r / "val"), ["val/img: no such folder"]),
    "an empty split": (
        lambda r: [path.unlink() for path in r.glob("val/*/*")],
        ["val/img: no JPEG or PNG images"],
    ),
    "all ignored": (
        lambda r: [save(path, np.full_like(np.array(Image.open(path)), 255)) for path in (r / "val/seg").iterdir()],
        ["every pixel of the val labels is 255"],
    ),
}


@pytest.mark.parametrize("case", TEN_WAYS)
def test_what_is_wrong_is_named_and_nothing_else(root, tmp_path, capsys, case):
    break_it, expected = TEN_WAYS[case]
    break_it(root)
    code, report, said = run(root, tmp_path, capsys, "--images", "0")
    assert code == 1 and len(report["mistakes"]) == len(expected), report["mistakes"]
    for mistake, start in zip(report["mistakes"], expected, strict=True):
        assert mistake.removeprefix(f"{root}/").startswith(start.replace("{root}", str(root))) and "\n" not in mistake
        assert f"wrong: {mistake}\n" in said
    assert f"{len(expected)} mistake" in said and not (tmp_path / "out" / "contact.png").exists()


def test_all_at_once(root, tmp_path, capsys):
    for case in ("an unreadable image", "a label as JPEG", "another size and a value out of range"):
        TEN_WAYS[case][0](root)
    assert len(run(root, tmp_path, capsys)[1]["mistakes"]) == 4


def test_pictures_that_occur_twice_in_a_split_are_noted(root, tmp_path, capsys):
    for copy in (2, 3):
        shutil.copy(root / "train/img/0.png", root / f"train/img/{copy}.png")
        save(root / f"train/seg/{copy}.png", ZEROS)
    code, report, _ = run(root, tmp_path, capsys)
    assert code == 0 and "2 images are the same picture as another of their split" in report["notes"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dataset", "folder:nowhere"], "nowhere: no such folder"),
        (["--dataset", "nothing"], "unknown --dataset"),
        (["--images", "-1"], "--images must be from 0 up"),
        (["--output", __file__], "is a file"),
        (["--num-classes", "7"], "names 4 classes"),
    ],
)
def test_a_mistake_in_the_options_is_one_line(root, tmp_path, capsys, options, said):
    code, report, printed = run(root, tmp_path, capsys, *options)
    assert (
        code == 2 and report is None and printed.startswith("error: ") and said in printed and printed.count("\n") == 1
    )


def test_prepared_data_are_checked_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shapes, "SMALL", shapes.ShapesConfig(counts=(2, 1, 1), height=32, width=32))
    monkeypatch.chdir(tmp_path)
    assert check_data.main(["--dataset", "shapes:small"]) == 0
    out = capsys.readouterr().out
    assert "beach ball" in out and (tmp_path / "runs" / "check-shapes-small" / "contact.png").is_file()
