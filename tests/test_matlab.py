"""SBD's annotations: real structs are read, anything else is named."""

import io

import numpy as np
import pytest
from scipy.io import savemat

from jaxseg.data.images import UnreadableFileError
from jaxseg.data.matlab import read_sbd_label
from tests.peers import small_voc


def mat(**variables) -> bytes:
    file = io.BytesIO()
    savemat(file, variables)
    return file.getvalue()


def test_an_annotation_is_read(tmp_path):
    label = small_voc.label("2009_000001", (7, 15), border=False)
    small_voc.save_annotation(tmp_path / "x.mat", label)
    read = read_sbd_label((tmp_path / "x.mat").read_bytes(), "x.mat")
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, label)


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
def test_what_scipy_writes_is_read_whatever_the_type(dtype):
    label = np.random.default_rng(0).integers(0, 21, (7, 5)).astype(dtype)
    for compress in (False, True):
        file = io.BytesIO()
        others = {"first": "text", "GTcls": {"a": [1, 2], "Segmentation": label, "z": {"Segmentation": 3}}, "last": 4}
        savemat(file, others, do_compression=compress)
        read = read_sbd_label(file.getvalue(), "x.mat")
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, label)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        mat(Segmentation=np.zeros((2, 2), np.uint8)),
        mat(GTcls=np.zeros((2, 2), np.uint8)),
        mat(GTcls={"Other": 1}),
        mat(GTcls={"Segmentation": "text"}),
        mat(GTcls={"Segmentation": np.zeros((2, 2, 3), np.uint8)}),
        mat(GTcls={"Segmentation": np.full((2, 2), 0.5)}),
        mat(GTcls={"Segmentation": np.full((2, 2), np.nan)}),
        mat(GTcls=np.zeros((1, 2), [("Segmentation", "O")])),
        mat(GTcls={"Segmentation": np.zeros((2, 2), np.uint8)})[:250],
        mat(GTcls={"Segmentation": np.zeros((0, 2), np.uint8)}),
        mat(GTcls={"Segmentation": np.full((2, 2), 256, np.uint16)}),
        mat(GTcls={"Segmentation": np.full((2, 2), -1, np.int8)}),
    ],
)
def test_what_is_none_is_named(content):
    with pytest.raises(UnreadableFileError, match=r"^x\.mat: .*; replace it$") as error:
        read_sbd_label(content, "x.mat")
    assert "\n" not in str(error.value)


def test_damaged_annotations_are_named_or_read(tmp_path):
    """The size and the values are checked against the image, and VOC's classes, later."""
    rng = np.random.default_rng(0)
    small_voc.save_annotation(tmp_path / "x.mat", small_voc.label("2009_000001", (7, 15), border=False))
    content, refused = (tmp_path / "x.mat").read_bytes(), 0
    for k in range(300):
        damaged = bytearray(content[: rng.integers(len(content))] if k % 3 == 0 else content)
        for place in rng.integers(0, max(len(damaged), 1) if k % 2 else min(len(damaged), 200) + 1, size=k % 3 and 3):
            if place < len(damaged):
                damaged[place] = rng.integers(256)
        try:
            assert read_sbd_label(bytes(damaged), "x.mat").ndim == 2
        except UnreadableFileError as error:
            refused += 1
            assert str(error).startswith("x.mat: ")
    assert refused > 100
