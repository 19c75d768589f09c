"""`experiments.predict`: what it writes for folders of photographs, and what it says of what it cannot read."""

import dataclasses
import re
import warnings

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import predict
from jaxseg import inference
from jaxseg.data.images import image_size, read_image
from jaxseg.data.labels import Labels
from jaxseg.decoders import BaselineDecoder
from jaxseg.manner import Manner
from tests.peers.saved_run import WIDTHS, save_run
from tests.peers.small_run import SmallEncoder

SIZES = {"a": (32, 64), "b": (1, 1), "c": (50, 33), "d": (32, 64)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run."""
    workdir = tmp_path_factory.mktemp("runs") / "one"
    save_run(workdir, BaselineDecoder(3, WIDTHS), scores=(0.5,))
    return workdir


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """One strided convolution in the ResNet's place, one device."""
    monkeypatch.setattr(inference, "ResNet", SmallEncoder)
    devices = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)


@pytest.fixture
def photographs(tmp_path):
    """A folder of photographs of mixed sizes; c lies on its side, as its EXIF data say."""
    folder, rng = tmp_path / "photographs", np.random.default_rng(0)
    folder.mkdir()
    for name, (height, width) in SIZES.items():
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        if name == "c":
            exif = Image.Exif()
            exif[0x0112] = 6
            image.transpose(Image.Transpose.ROTATE_90).save(folder / "c.JPG", exif=exif)
        else:
            image.save(folder / f"{name}.png")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no picture")
    return folder


def read(path):
    image = Image.open(path)
    assert image.format == "PNG" and image.mode == "L"
    return np.asarray(image)


def test_each_photograph_gives_a_class_map_of_its_stem_and_size(run, photographs, tmp_path, capsys):
    output = tmp_path / "new" / "maps"
    assert predict.main([str(run), str(photographs), "--output", str(output), "--overlay", "--batch-size", "1"]) == 0
    assert sorted(path.name for path in output.iterdir()) == [*(f"{name}.png" for name in SIZES), "overlay"]
    assert sorted(path.stem for path in (output / "overlay").iterdir()) == list(SIZES)
    trained = inference.load_run(run)
    for path in (path for path in photographs.iterdir() if path.stem in SIZES):
        classes = read(output / f"{path.stem}.png")
        assert classes.shape == SIZES[path.stem]
        np.testing.assert_array_equal(classes, inference.segment(trained, read_image(path)))
    drawn = np.asarray(Image.open(output / "overlay" / "a.png").convert("RGB")).reshape(-1, 3)
    assert len(drawn) > 1000 * 500 and (drawn == (255, 255, 255)).all(1).mean() > 0.02
    out = capsys.readouterr().out
    assert "each image resized to 32x64" in out and re.search(r"4 class maps in .*, [\d.]+ images/s", out)


def test_letters_that_the_legends_font_lacks_are_told_of_in_one_line(run, photographs, tmp_path, capsys, monkeypatch):
    trained = inference.load_run(run)
    names = Labels(("\u9053", "\u7a7a", "car"), trained.labels.colours)
    monkeypatch.setattr(inference, "load_run", lambda *_: dataclasses.replace(trained, labels=names))
    argv = [str(run), str(photographs / "b.png"), "--output", str(tmp_path / "maps"), "--overlay"]
    with warnings.catch_warnings(record=True) as caught:
        assert predict.main(argv) == 0
    assert not caught and capsys.readouterr().err.count("font lacks letters of the class names") == 1


def test_photographs_are_classified_at_their_own_size_mirrored_and_scaled_if_wanted(run, photographs, tmp_path):
    options = ["--size", "native", "--flip", "--scales", "1", "0.5", "--checkpoint", "1", "--batch-size", "1"]
    argv = [str(run), *map(str, (photographs / "a.png", photographs / "c.JPG")), "--output", str(tmp_path / "maps")]
    assert predict.main([*argv, *options]) == 0
    manner = Manner(None, flip=True, scales=(1.0, 0.5))
    assert image_size(photographs / "c.JPG") == SIZES["c"]
    for name in ("a.png", "c.JPG"):
        expected = inference.segment(inference.load_run(run), read_image(photographs / name), manner)
        np.testing.assert_array_equal(read(tmp_path / "maps" / f"{name[0]}.png"), expected)


def test_photographs_that_are_not_drawn_are_not_kept(photographs):
    for keep in (False, True):
        read_one = predict.read_and_prepare(photographs / "a.png", Manner((32, 32)), {}, keep)
        assert (read_one.image is not None) == keep and read_one.prepared.shapes == ((32, 32, 3),)


def test_what_cannot_be_read_is_named_and_skipped(run, photographs, tmp_path, capsys):
    cut = (photographs / "a.png").read_bytes()
    (photographs / "cut.png").write_bytes(cut[: len(cut) // 2])
    (photographs / "picture.webp").write_bytes(b"")
    assert predict.main([str(run), str(photographs), "--output", str(tmp_path / "maps")]) == 1
    assert sorted(path.stem for path in (tmp_path / "maps").iterdir()) == list(SIZES)
    err = capsys.readouterr().err
    assert f"skipped: {photographs / 'cut.png'}: cannot be read" in err
    assert f"skipped: {photographs / 'picture.webp'}: neither JPEG nor PNG" in err
    assert err.rstrip().endswith("error: 2 files skipped, named above")


def test_a_mistake_is_one_line_and_nothing_is_written(run, photographs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "more").mkdir()
    image, output = photographs / "a.png", tmp_path / "maps"
    (tmp_path / "more" / "a.jpg").write_bytes(image.read_bytes())
    cases = [
        ([tmp_path / "nowhere", image], "no such folder: name the workdir of a run"),
        ([tmp_path / "empty", image], "holds no checkpoint"),
        ([run, tmp_path / "empty"], "no JPEG or PNG images in it"),
        ([run, tmp_path / "none.jpg"], "no such file or folder"),
        ([run], "name at least one image"),
        ([run, photographs, tmp_path / "more"], f"{image} and {tmp_path / 'more' / 'a.jpg'} have the same stem"),
        ([run, image, image], "is given twice"),
        ([run, image, "--output", tmp_path / "file"], "is a file: name a folder"),
        ([run, image, "--output", photographs], f"{image} is an image to be classified"),
        ([run, image, "--output", photographs, "--overwrite"], f"{image} is an image to be classified"),
        ([run, image, "--checkpoint", "9"], "no checkpoint 9, only 1"),
        ([run, image, "--checkpoint", "first"], "use best, last or the number"),
        ([run, image, "--batch-size", "0"], "--batch-size must be 1 or more"),
        ([run, image, "--tile", "100"], "tile"),
        ([run, image, "--scales", "0"], "scales"),
    ]
    for arguments, message in cases:
        assert predict.main(["--output", str(output), *map(str, arguments)]) == 2, message
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], lines
    assert not output.exists() and {path.stem for path in photographs.iterdir()} == {*SIZES, ".hidden", "notes"}


def test_files_that_are_there_are_replaced_only_if_asked(run, photographs, tmp_path, capsys):
    argv = [str(run), str(photographs / "a.png"), "--output", str(tmp_path)]
    (tmp_path / "a.png").write_text("somebody's")
    assert predict.main(argv) == 2 and "there already" in capsys.readouterr().err
    assert (tmp_path / "a.png").read_text() == "somebody's"
    assert predict.main([*argv, "--overwrite"]) == 0
    assert read(tmp_path / "a.png").shape == SIZES["a"]


def test_a_file_that_cannot_be_written_is_named(run, photographs, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert predict.main([str(run), str(photographs), "--output", str(tmp_path / "maps")]) == 1
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"error: .*No space left on device.*maps/\w.png", err), err
