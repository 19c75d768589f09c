"""The report's nine classes, made from a miniature of PASCAL VOC 2012 and SBD in their own formats and layout."""

import hashlib
import io
import os
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from jaxseg.data import voc9
from jaxseg.data.labels import VOC9
from tests.peers import small_voc
from tests.test_download import Server, server  # noqa: F401

# VOC's names in its order, which is the alphabet's.
NAMES = ["background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"]
NAMES += ["diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tv/monitor"]


def in_nine(label: np.ndarray) -> np.ndarray:
    """By the classes' names, pixel by pixel."""
    nine = [
        255 if value == 255 else VOC9.names.index(name) if (name := NAMES[value]) in VOC9.names else 0
        for value in label.ravel()
    ]
    return np.array(nine, np.uint8).reshape(label.shape)


EXPECTED = {
    "train": {  # 2007_000003 shows an aeroplane only in VOC's own label, 2008_000000 is held out
        "2007_000001": small_voc.label("2007_000001", (15,)),
        "2007_000003": small_voc.label("2007_000003", (1, 9)),
        "2009_000001": small_voc.label("2009_000001", (7,), border=False),
    },
    "val": {name: small_voc.label(name, small_voc.VAL[name]) for name in ("2008_000000", "2008_000001", "2008_000003")},
    "test": {name: small_voc.label(name, small_voc.VAL[name]) for name in ("2008_000004", "2008_000005")},
}


def check(opened) -> None:
    assert list(opened) == ["train", "val", "test"]
    for split, expected in EXPECTED.items():
        assert [opened[split][k]["name"] for k in range(len(opened[split]))] == list(expected)
        for k, (name, label) in enumerate(expected.items()):
            item = opened[split][k]
            np.testing.assert_array_equal(item["label"], in_nine(label))
            np.testing.assert_array_equal(opened[split].label(k), item["label"])
            np.testing.assert_allclose(item["image"], jpeg(small_voc.image(name)))
            assert opened[split].label_sizes()[k].tolist() == list(small_voc.size(name))


def jpeg(pixels: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=95)
    return np.asarray(Image.open(file))


@pytest.fixture
def unpacked(tmp_path) -> pathlib.Path:
    root = tmp_path / "unpacked"
    small_voc.write(root)
    return root


@pytest.fixture
def archives(unpacked, tmp_path, monkeypatch) -> pathlib.Path:
    """A folder of the two archives, whose digests are taken for the real ones'."""
    folder = tmp_path / "archives"
    folder.mkdir()
    small_voc.pack(unpacked, folder)
    voc, sbd = ((folder / name).read_bytes() for name in (voc9.VOC_ARCHIVE, voc9.SBD_ARCHIVE))
    monkeypatch.setattr(voc9, "VOC_DIGEST", f"sha256:{hashlib.sha256(voc).hexdigest()}")
    monkeypatch.setattr(voc9, "SBD_DIGEST", f"md5:{hashlib.md5(sbd).hexdigest()}")
    return folder


def open_in(tmp_path, manual_dir, **options):
    return voc9.open_voc9(tmp_path / "data", voc9.find_sources(manual_dir), **options)


def test_the_splits_follow_the_rule_from_archives_and_need_them_only_once(archives, tmp_path, capsys):
    check(open_in(tmp_path, archives))
    said = "voc9: 3 train, 3 val, 2 test images; the report has 5460, 500, 500 (-5457, -497, -498)"
    assert said in capsys.readouterr().out
    written = [path.relative_to(tmp_path / "data") for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert {path.parts[0] for path in written} == {"voc9", "voc9.lock"}  # nothing was unpacked
    shutil.rmtree(archives)
    check(open_in(tmp_path, None))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("inside", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_unpacked_folders_do_and_what_was_made_of_others_is_not_taken_for_them(unpacked, tmp_path, inside):
    if inside:
        shutil.move(unpacked / "benchmark_RELEASE/dataset/cls", unpacked / inside / "cls")
    check(open_in(tmp_path, unpacked / inside))
    if inside:
        return
    # The same command again reads the new label.
    label = small_voc.label("2008_000005", (13, 13))
    small_voc.save_label(unpacked / "VOCdevkit/VOC2012/SegmentationClass/2008_000005.png", label)
    np.testing.assert_array_equal(open_in(tmp_path, unpacked)["test"].label(1), in_nine(label))
    assert len(list((tmp_path / "data/voc9").iterdir())) == 2


def test_a_folder_of_labels_may_stand_in_for_sbd(unpacked, tmp_path):
    """It holds VOC's own labels too, without their border, and those of the held-out images."""
    shutil.rmtree(unpacked / "benchmark_RELEASE")
    folder = unpacked / "VOCdevkit/VOC2012/SegmentationClassAug"
    folder.mkdir()
    for name, classes in {**small_voc.TRAIN, **small_voc.VAL, **small_voc.SBD}.items():
        Image.fromarray(small_voc.label(name, classes, border=False)).save(folder / f"{name}.png")
    check(open_in(tmp_path, unpacked))


def test_archives_are_downloaded_verified_and_kept(archives, tmp_path, monkeypatch, server):  # noqa: F811
    contents = {name: (archives / name).read_bytes() for name in (voc9.VOC_ARCHIVE, voc9.SBD_ARCHIVE)}
    served = []

    class Either:
        def __getitem__(self, key):
            return contents[served[-1]][key]

    fetch = voc9.fetch
    monkeypatch.setattr(
        voc9, "fetch", lambda name, *rest, **options: served.append(name) or fetch(name, *rest, **options)
    )
    monkeypatch.setattr(voc9, "VOC_URL", server.url)
    monkeypatch.setattr(voc9, "SBD_URL", server.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server.content, server.drop = Either(), [40_000]
    check(open_in(tmp_path, None))
    assert served == [voc9.VOC_ARCHIVE, voc9.SBD_ARCHIVE]
    assert server.requests == [None, "bytes=40000-", None]
    for name, content in contents.items():
        assert (tmp_path / "data/downloads" / name).read_bytes() == content


def test_offline_one_line_says_which_file_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setattr(voc9, "VOC_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(ValueError, match=r"cannot download .*: put VOCtrainval_11-May-2012.tar into") as error:
        open_in(tmp_path, None)
    assert str(tmp_path / "data/downloads") in str(error.value) and "--manual-dir DIR with" in str(error.value)
    assert "benchmark.tgz" in str(error.value) and "\n" not in str(error.value)


def test_a_manual_folder_with_nothing_in_it_is_not_taken_for_a_download(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"nothing of VOC or SBD is in it; put there VOCtrainval"):
            voc9.find_sources(folder)


def test_a_damaged_archive_is_named(archives, tmp_path):
    path = archives / voc9.SBD_ARCHIVE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{path} is damaged or another file"):
        open_in(tmp_path, archives)


def damage(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "image": ("VOCdevkit/VOC2012/JPEGImages/2007_000001.jpg", damage, "cannot be read", "train"),
    "no image": ("VOCdevkit/VOC2012/JPEGImages/2007_000001.jpg", os.unlink, "No such file", "train"),
    "label": ("VOCdevkit/VOC2012/SegmentationClass/2008_000005.png", damage, "cannot be read", "test"),
    "no label": ("VOCdevkit/VOC2012/SegmentationClass/2008_000005.png", os.unlink, "but a list in", "test"),
    "annotation": ("benchmark_RELEASE/dataset/cls/2009_000001.mat", damage, "as an SBD annotation", "train"),
    "size": (
        "VOCdevkit/VOC2012/SegmentationClass/2007_000001.png",
        lambda path: small_voc.save_label(path, np.full((9, 9), 15, np.uint8)),
        "but its label is 9x9",
        "train",
    ),
    "value": (
        "VOCdevkit/VOC2012/SegmentationClass/2007_000001.png",
        lambda path: small_voc.save_label(path, np.full((9, 9), 21, np.uint8)),
        "has the value 21, which is no class of VOC",
        "train",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_bad_file_is_named_and_left_out_only_if_told_to(unpacked, tmp_path, capsys, case):
    path, break_it, said, split = DAMAGES[case]
    break_it(unpacked / path)
    with pytest.raises(ValueError, match=said) as error:
        open_in(tmp_path, unpacked)
    message = str(error.value)
    assert pathlib.Path(path).stem in message and str(unpacked) in message and message.endswith("--skip-bad")
    for _ in range(2):  # what was left out is told of each time
        opened = open_in(tmp_path, unpacked, skip_bad=True)
        err = capsys.readouterr().err
        assert "voc9 is prepared without 1 images:" in err and said in err
        total = sum(len(expected) for expected in EXPECTED.values())
        assert sum(len(source) for source in opened.values()) == total - 1
        assert pathlib.Path(path).stem not in {opened[split][k]["name"] for k in range(len(opened[split]))}
    # And what is prepared without it is not taken for the whole.
    with pytest.raises(ValueError, match=said):
        open_in(tmp_path, unpacked)


def test_a_changed_builder_needs_a_new_version(unpacked, tmp_path):
    """Data of the same version is not made again: whoever changes what is made must change VERSION, then the digest."""
    opened = open_in(tmp_path, unpacked)
    state = hashlib.sha256()
    for source in opened.values():
        for k in range(len(source)):
            state.update(source[k]["name"].encode() + source[k]["label"].tobytes())
    assert (str(voc9.Voc9.VERSION), state.hexdigest()[:16]) == ("1.0.0", "035259f4b48aeef9")
