"""A file is replaced whole, or stays as it was."""

import errno
import os

import pytest

from jaxseg.files import replacing


def test_a_file_is_made_and_replaced(tmp_path):
    path = tmp_path / "picture.png"
    for text in ("first", "second"):
        with replacing(path) as new:
            new.write_text(text)
            assert new.suffix == ".png" and new.parent == tmp_path
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("when", ["writing", "flushing"])
def test_a_full_disk_keeps_what_was_there_and_names_the_file(tmp_path, monkeypatch, when):
    path = tmp_path / "results.json"
    path.write_text("good")
    if when == "flushing":
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught, replacing(path) as new:
        new.write_text("cut o")
        if when == "writing":
            full()
    assert str(path) in str(caught.value) and caught.value.errno == errno.ENOSPC
    assert path.read_text() == "good" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_whatever_else_goes_wrong_keeps_it_too(tmp_path, error):
    path = tmp_path / "metrics.csv"
    path.write_text("good")
    with pytest.raises(error), replacing(path) as new:
        new.write_text("half")
        raise error
    assert path.read_text() == "good" and list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_named(tmp_path):
    path = tmp_path / "no" / "file.txt"
    with pytest.raises(FileNotFoundError, match=r"file\.txt"), replacing(path) as new:
        new.write_text("text")
