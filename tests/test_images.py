"""Images and labels: what is read, against Pillow and hand-made files; what is damaged is named."""

import io
import os
import pathlib
import re
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


def encode(array: np.ndarray, kind: str = "PNG", mode: str | None = None, **options) -> bytes:
    """The content of a file, in a mode of Pillow's."""
    file, image = io.BytesIO(), Image.fromarray(array)
    (image.convert(mode) if mode else image).save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A piece of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def build_png(size: tuple[int, int], bits: int, colour_type: int, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG whose rows, each with its filter byte, are given; for what Pillow does not write."""
    header = struct.pack(">IIBBBBB", *size, bits, colour_type, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + b"".join(chunks) + chunk(b"IEND", b"")


def with_orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


PHOTO = random_image(16, 24)
GREY = PHOTO[..., 0]
OPAQUE = np.full((16, 24), 255, np.uint8)


def as_pillow_shows(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def say_twelve_bits() -> bytes:
    """A baseline JPEG whose header claims 12 bits in a channel, which few decoders know."""
    content = bytearray(encode(PHOTO, "JPEG"))
    content[content.index(b"\xff\xc0") + 4] = 12
    return bytes(content)


def say_arithmetic() -> bytes:
    """A JPEG whose header claims that arithmetic coding follows, where Huffman's does."""
    return encode(PHOTO, "JPEG").replace(b"\xff\xc0", b"\xff\xc9")


# Images that are read, and as what.
READ = {
    "progressive JPEG": (encode(PHOTO, "JPEG", progressive=True), None),
    "grey JPEG": (encode(GREY, "JPEG"), None),
    "CMYK JPEG": (encode(PHOTO, "JPEG", "CMYK"), None),
    "JPEG of two pictures": (encode(PHOTO, "MPO", save_all=True, append_images=[Image.fromarray(GREY)]), None),
    "JPEG with damaged EXIF": (encode(PHOTO, "JPEG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff"), None),
    "JPEG with EXIF of noise": (encode(PHOTO, "JPEG", exif=b"Exif\0\0" + GREY.tobytes()), None),
    "JPEG with an orientation of 9": (encode(PHOTO, "JPEG", exif=with_orientation(9)), None),
    "JPEG with a damaged profile": (encode(PHOTO, "JPEG", icc_profile=b"?" * 99), None),
    "PNG with a damaged profile": (encode(PHOTO, icc_profile=b"?" * 99), PHOTO),
    "grey PNG": (encode(GREY), np.repeat(GREY[..., None], 3, -1)),
    "1-bit PNG": (encode(GREY > 99), np.repeat(np.where(GREY > 99, 255, 0)[..., None], 3, -1)),
    "grey PNG with alpha": (encode(np.dstack([GREY, OPAQUE])), np.repeat(GREY[..., None], 3, -1)),
    "palette with a transparent colour": (
        encode(np.array([[0, 1, 1]], np.uint8) * 9, mode="P", transparency=0),
        np.array([[[255] * 3, [9] * 3, [9] * 3]]),
    ),
    "16-bit RGB PNG": (
        build_png((2, 1), 16, 2, b"\0" + struct.pack(">6H", *(256 * k + 255 - k for k in range(6)))),
        np.array([[[0, 1, 2], [3, 4, 5]]]),
    ),
    "16-bit RGB PNG with alpha": (
        build_png((2, 1), 16, 6, b"\0" + struct.pack(">8H", 999, 0, 0, 0, 256, 512, 768, 65535)),
        np.array([[[255, 255, 255], [1, 2, 3]]]),
    ),
    "animated PNG": (encode(PHOTO, save_all=True, append_images=[Image.fromarray(255 - PHOTO)]), PHOTO),
    "PNG without its last chunk": (encode(PHOTO)[:-12], PHOTO),
}


@pytest.mark.parametrize("what", READ)
def test_an_image_is_read(what):
    content, expected = READ[what]
    image = images.read_image(io.BytesIO(content), what)
    assert image.dtype == np.uint8 and image.shape[-1] == 3
    np.testing.assert_array_equal(image, as_pillow_shows(content) if expected is None else expected)


# Labels that are read, and as what; the classes' colours are COLOURS.
COLOURS = ((0, 0, 0), (128, 64, 128), (7, 8, 9), (3, 3, 3))
LABEL = np.array([[0, 1, 2], [3, 255, 0]], np.uint8)
PAINTED = np.array([[*COLOURS[:3]], [COLOURS[3], (255, 255, 255), COLOURS[0]]], np.uint8)
READ_LABELS = {
    "grey": encode(LABEL),
    "grey with a transparent value": encode(LABEL, transparency=1),
    "grey with alpha": encode(np.dstack([LABEL, np.full_like(LABEL, 255)])),
    "grey as RGB": encode(np.repeat(LABEL[..., None], 3, -1)),
    "grey as RGB with alpha": encode(np.dstack([LABEL] * 3 + [np.full_like(LABEL, 255)])),
    "16-bit grey": encode(LABEL.astype(np.uint16)),
    "colours": encode(PAINTED),
    "colours with alpha": encode(np.dstack([PAINTED, np.full_like(LABEL, 255)])),
    "upright": encode(LABEL, exif=with_orientation(1)),
    "damaged EXIF": encode(LABEL, exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff"),
}


@pytest.mark.parametrize("what", READ_LABELS)
def test_a_label_is_read(what):
    classes = images.read_label(io.BytesIO(READ_LABELS[what]), what, COLOURS)
    assert classes.dtype == np.uint8
    np.testing.assert_array_equal(classes, LABEL)
    assert images.label_size(io.BytesIO(READ_LABELS[what]), what) == LABEL.shape


def test_a_mask_of_one_bit_is_class_0_and_1():
    np.testing.assert_array_equal(images.read_label(io.BytesIO(encode(LABEL > 1)), "x"), LABEL > 1)


def test_a_transparent_palette_entry_is_a_class_like_the_others(tmp_path):
    image = Image.fromarray(LABEL, "P")
    image.putpalette(bytes(range(256)) * 3)
    image.save(tmp_path / "x.png", transparency=0)
    np.testing.assert_array_equal(images.read_label(tmp_path / "x.png"), LABEL)


# Pixels of values 1 and 2, which Pillow would give as 17 and 34.
FOUR_BITS = build_png((2, 1), 4, 0, b"\0\x12")
SHORT = np.dstack([PAINTED, np.array([[255, 255, 255], [255, 254, 255]], np.uint8)])
REFUSED = {
    "zero bytes": (b"", "its content is not PNG"),
    "text": (b"oops", "its content is not PNG"),
    "JPEG": (encode(LABEL, "JPEG"), "its content is not PNG; convert, replace or remove it"),
    "GIF": (encode(LABEL, "GIF"), "its content is not PNG"),
    "half": (encode(GREY)[:200], "cannot be read (image file is truncated"),
    "bomb": (build_png((2**14, 2**13), 8, 0, b""), "bytes hold no 16384 x 8192 pixels"),
    "large bomb": (build_png((2**16, 2**15), 8, 0, b""), "cannot be read (Image size (2147483648 pixels) exceeds"),
    "4-bit grey": (FOUR_BITS, "the label has 4 bits in a channel; save the class of each pixel as one 8-bit value"),
    "16-bit grey": (encode(LABEL.astype(np.uint16) * 257), "the label has the 16-bit value 65535"),
    "16-bit RGB": (build_png((1, 1), 16, 2, b"\0" + bytes(6)), "the label has 16 bits in a channel"),
    "16-bit alpha": (build_png((1, 1), 16, 4, b"\0" + b"\0\0\xff\xff"), "the label has 16 bits in a channel"),
    "transparent": (encode(SHORT), "the label has transparent pixels, whose class is not clear"),
    "transparent grey": (encode(SHORT[..., 2:]), "the label has transparent pixels"),
    "a colour of no class": (encode(PAINTED + np.uint8(1)), "has the colour #010101 in row 0, column 0, which is not"),
    "turned": (encode(LABEL, exif=with_orientation(6)), "a label that EXIF data turn; save it upright"),
    # It may mean the class 4, by its colour, or 7.
    "grey or colour": (encode(np.full((2, 2, 3), 7, np.uint8)), "the label is RGB with greys that are the colours of"),
}


@pytest.mark.parametrize(
    "content",
    [
        build_png((1, 1), 8, 3, b"\0\0"),  # Pillow raises AssertionError, of the palette that is missing,
        build_png((1, 1), 8, 0, b"\0\0", chunk(b"iCCP", b"x\0")),  # and IndexError, of the profile that is too short
    ],
    ids=["no palette", "short profile"],
)
def test_what_pillow_does_not_expect_is_refused_too(content):
    with pytest.raises(images.UnreadableFileError, match=r"^x: cannot be read \("):
        images.read_image(io.BytesIO(content), "x")


@pytest.mark.parametrize("what", REFUSED)
def test_a_label_is_refused_in_one_line(what):
    content, message = REFUSED[what]
    with pytest.raises(images.UnreadableFileError, match=re.escape(message)) as error:
        images.read_label(io.BytesIO(content), what, (*COLOURS, (7, 7, 7)))
    assert str(error.value).startswith(f"{what}: ") and "\n" not in str(error.value)


def test_a_colour_of_two_classes_is_refused():
    with pytest.raises(images.UnreadableFileError, match=r"#804080 in row 0, column 1, which is not that of one class"):
        images.read_label(io.BytesIO(encode(PAINTED)), "x", (*COLOURS, COLOURS[1]))
    with pytest.raises(images.UnreadableFileError, match=r"#000000 in row 0, column 0, which is not that of one class"):
        images.read_label(io.BytesIO(encode(PAINTED)), "x", [(255, 255, 255)] * 2)


def test_a_pipe_a_folder_and_nothing_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name, message in (("pipe", "not a file"), ("folder", "not a file"), ("nothing", "No such file or directory")):
        for read in (images.read_image, images.read_label, images.label_size):
            with pytest.raises(images.UnreadableFileError, match=message) as error:
                read(tmp_path / f"{name}.png")
            assert str(error.value).startswith(f"{tmp_path / name}.png: ")


def damage(rng: np.random.Generator, content: bytes) -> bytes:
    """Some bytes changed, put in, left out, or the end cut off; half of the time near the beginning."""
    damaged = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        place = int(rng.integers(len(content) if rng.random() < 0.5 else 150))
        match rng.integers(5):
            case 0 | 1:
                damaged[place : place + 1] = bytes([rng.integers(256)])
            case 2:
                damaged[place:place] = rng.bytes(rng.integers(1, 9))
            case 3:
                del damaged[place : place + rng.integers(1, 9)]
            case 4 if rng.random() < 0.3:
                del damaged[place:]
    return bytes(damaged)


def damage_chunk(rng: np.random.Generator, content: bytes) -> bytes:
    """The same within one chunk of a PNG, whose length and checksum are put right."""
    place, chunks = 8, []
    while place < len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += 12 + length
    chosen = rng.integers(len(chunks))
    kind, data = chunks[chosen]
    chunks[chosen] = (kind, damage(rng, data + bytes(150))[: len(data) + rng.integers(-2, 3)])
    return content[:8] + b"".join(chunk(*one) for one in chunks)


def test_whatever_is_damaged_is_read_or_refused_by_name():
    rng = np.random.default_rng(0)
    contents = [content for content, _ in READ.values()] + list(READ_LABELS.values())
    contents += [encode(PHOTO, exif=with_orientation(6)), encode(PHOTO, "JPEG", exif=with_orientation(6))]
    refused = 0
    for k in range(3000):
        content = contents[k % len(contents)]
        change = damage_chunk if k % 2 and content.startswith(b"\x89PNG") else damage
        content = change(rng, content)
        for read, dimensions in ((images.read_image, 3), (images.read_label, 2)):
            try:
                array = read(io.BytesIO(content), "x")
                assert array.dtype == np.uint8 and array.ndim == dimensions
            except images.UnreadableFileError as error:
                refused += 1
                assert str(error).startswith("x: ") and "\n" not in str(error)
    assert 1000 < refused < 5900


@pytest.mark.parametrize("content", [say_twelve_bits(), say_arithmetic()], ids=["12 bits", "arithmetic"])
def test_a_jpeg_that_is_not_what_it_says_is_refused_or_read(content):
    try:
        assert images.read_image(io.BytesIO(content), "x").shape == PHOTO.shape
    except images.UnreadableFileError as error:
        assert str(error).startswith("x: ")


def test_what_was_in_a_file_is_read_as_the_file_is(tmp_path):
    save(tmp_path / "x.png", random_image(4, 6))
    content = (tmp_path / "x.png").read_bytes()
    np.testing.assert_array_equal(images.read_image(io.BytesIO(content), "x"), random_image(4, 6))
    with pytest.raises(images.UnreadableFileError, match=r"^x: cannot be read"):
        images.read_image(io.BytesIO(content[:-30]), "x")
    with pytest.raises(ValueError, match=r"^x: the label has the colour #"):
        images.read_label(io.BytesIO(content), "x")
