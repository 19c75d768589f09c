"""Images and labels: what is read, against Pillow and hand-made files; what is damaged is named."""

import io
import pathlib
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from jaxseg.data import images


def save(path: pathlib.Path, array: np.ndarray, **options) -> None:
    Image.fromarray(array).save(path, **options)


def random_image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_orientation(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / f"x.{suffix}", random_image(8, 16), exif=exif)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / f"x.{suffix}"))
    np.testing.assert_array_equal(images.read_image(tmp_path / f"x.{suffix}"), np.asarray(expected))


def test_exif_orientation_by_hand(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a phone held upright: the stored first row is the picture's right-hand column
    stored = random_image(4, 6)
    save(tmp_path / "x.png", stored, exif=exif)
    np.testing.assert_array_equal(images.read_image(tmp_path / "x.png")[:, -1], stored[0])


def test_image_modes(tmp_path):
    colour = np.full((4, 4, 3), (200, 100, 50), np.uint8)
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
    save(tmp_path / "grey.png", grey)
    save(tmp_path / "grey16.png", grey.astype(np.uint16) * 256 + 17)
    Image.fromarray(colour).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    Image.fromarray(colour).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    alpha = np.full((4, 4), 255, np.uint8)
    alpha[0] = (0, 51, 102, 255)
    save(tmp_path / "alpha.png", np.dstack([colour, alpha]))

    for name in ("grey", "grey16"):
        np.testing.assert_array_equal(images.read_image(tmp_path / f"{name}.png"), np.repeat(grey[..., None], 3, -1))
    np.testing.assert_array_equal(images.read_image(tmp_path / "palette.png"), colour)
    np.testing.assert_allclose(images.read_image(tmp_path / "cmyk.jpg").astype(int), colour, atol=3)
    on_white = colour * (alpha[..., None] / 255) + 255 * (1 - alpha[..., None] / 255)
    np.testing.assert_allclose(images.read_image(tmp_path / "alpha.png"), on_white, atol=1)


def test_palette_labels_keep_their_indices(tmp_path):
    for colours in (2, 4, 16, 256):  # 1, 2, 4 and 8 bits per pixel in the file
        label = np.random.default_rng(0).integers(0, colours, (9, 7), np.uint8)
        image = Image.fromarray(label, "L").convert("P")
        image.putdata(label.ravel().tolist())
        image.putpalette(np.random.default_rng(1).integers(0, 256, 3 * colours).astype(np.uint8).tobytes())
        image.save(tmp_path / "x.png", bits=(colours - 1).bit_length())
        np.testing.assert_array_equal(images.read_label(tmp_path / "x.png"), label)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged EXIF data
def test_damaged_files_give_a_value_error_or_an_image(tmp_path):
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = []
    for options in ({"suffix": "jpg", "exif": exif}, {"suffix": "png"}):
        path = tmp_path / f"x.{options.pop('suffix')}"
        save(path, random_image(16, 24), **options)
        files.append((path, path.read_bytes()))
    refused = 0
    for k in range(400):
        path, content = files[k % 2]
        damaged = bytearray(content)
        for place in rng.integers(0, len(content) if k % 4 < 2 else 120, size=3):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            assert images.read_image(path).ndim == 3
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    assert refused > 100


def test_a_grey_label_of_four_bits_is_refused(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    # Two pixels of values 1 and 2, which Pillow would give as 17 and 34.
    header, pixels = struct.pack(">IIBBBBB", 2, 1, 4, 0, 0, 0, 0), zlib.compress(b"\0\x12")
    path = tmp_path / "label.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))
    with pytest.raises(ValueError, match="fewer than 8 bits"):
        images.read_label(path)


def test_what_was_in_a_file_is_read_as_the_file_is(tmp_path):
    save(tmp_path / "x.png", random_image(4, 6))
    content = (tmp_path / "x.png").read_bytes()
    np.testing.assert_array_equal(images.read_image(io.BytesIO(content), "x"), random_image(4, 6))
    with pytest.raises(images.UnreadableFileError, match=r"^x: cannot be read"):
        images.read_image(io.BytesIO(content[:-30]), "x")
    with pytest.raises(ValueError, match=r"^x: a label must be an 8-bit grey or palette PNG"):
        images.read_label(io.BytesIO(content), "x")
