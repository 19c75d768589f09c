"""Reads images and labels, from files or from memory: each as a user would expect, or refused by name; encodes them."""

import collections
import io
import os
import stat
import warnings
from collections.abc import Sequence
from typing import BinaryIO, NoReturn

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from jaxseg.data.labels import IGNORE_LABEL, Colour

# Pillow warns of what is dealt with below, without the file's name.
warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# A path, or a file that is open, with what messages call it.
File = str | os.PathLike | BinaryIO

# What makes an image upright, by its EXIF orientation. Pillow's `exif_transpose` would also write the EXIF data anew,
# and fail where they are damaged.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = [_UPRIGHT[orientation] for orientation in (5, 6, 7, 8)]
# Deflate makes of a byte at most so many: a short file whose header promises more is not whole, but may take gigabytes.
_MOST_INFLATED = 1032
# Of a pixel in a PNG, by the name that Pillow gives to how it is stored.
_BITS = {"1": 1, "L;2": 2, "L;4": 4, "P;1": 1, "P;2": 2, "P;4": 4, "RGB": 24, "RGB;16B": 48, "RGBA": 32, "LA": 16}


class UnreadableFileError(ValueError):
    """An image or a label that cannot be read; the message names it and the remedy."""


def read_image(file: File, name: str | None = None) -> np.ndarray:
    """Reads a JPEG or PNG as 8-bit RGB, turned upright as its EXIF orientation says.

    Transparent pixels are shown on white; 16-bit values keep their upper 8 bits; of an animation the first picture is
    read. EXIF data that are damaged turn nothing.

    Args:
      file: a path, or an open file.
      name: what messages call it; needed for an open file.

    Returns:
      (H, W, 3) uint8.

    Raises:
      UnreadableFileError: the file cannot be read.
    """
    where = str(name or file)
    with _open(file, where, ("JPEG", "PNG")) as image:
        try:
            rgb, turn = _to_rgb(image), _turn(image)
            return np.asarray(rgb if turn is None else rgb.transpose(turn))
        # Pillow does not say what a damaged file may raise: it has been IndexError and AssertionError, too.
        except Exception as error:
            raise _unreadable(where, error) from error


def image_size(file: File, name: str | None = None) -> tuple[int, int]:
    """The height and width in pixels that an image has upright, from its header alone.

    Of a PNG, whose EXIF data may come last, it is the size as it is stored. Arguments and errors as `read_image`'s.
    """
    with _open(file, str(name or file), ("JPEG", "PNG")) as image:
        turned = image.format == "JPEG" and _turn(image) in _SIDEWAYS
        return (image.width, image.height) if turned else (image.height, image.width)


def read_label(file: File, name: str | None = None, colours: Sequence[Colour] = ()) -> np.ndarray:
    """Reads a label, a PNG. What does not say clearly which class a pixel has is refused.

    - 8-bit grey: the values. 16-bit grey: the values, all of them below 256. 1-bit: 0 and 1, black and white.
    - Palette: the indices, whatever their colours are.
    - RGB: the class whose colour it is, white being ignored; or the value, where the three channels are equal in all
      pixels. Where the one and the other would give different classes it is refused.
    - An alpha channel must be opaque. A grey value or colour that is marked as transparent is one like the others.

    Args:
      file: a path, or an open file.
      name: what messages call it; needed for an open file.
      colours: of the classes, in label order.

    Returns:
      (H, W) uint8.

    Raises:
      UnreadableFileError: the file cannot be read, or is none of these.
    """
    where = str(name or file)
    with _open(file, where, ("PNG",)) as label:
        stored = str(label.tile[0].args if label.tile else label.mode)
        try:
            label.load()
            values, turn = np.asarray(label), _turn(label)
        except Exception as error:
            raise _unreadable(where, error) from error
    if turn is not None:
        raise UnreadableFileError(f"{where}: a label that EXIF data turn; save it upright, without EXIF data")
    # Pillow stretches grey values of 2 and 4 bits to 0..255, and shortens colours of 16 bits: it changes the classes.
    if stored in ("L;2", "L;4") or (stored.endswith(";16B") and values.ndim == 3):
        _refuse(where, f"has {'16' if '16' in stored else stored[-1]} bits in a channel")
    if values.ndim == 3 and values.shape[-1] in (2, 4):
        if (values[..., -1] != 255).any():
            _refuse(where, "has transparent pixels, whose class is not clear")
        values = values[..., 0] if values.shape[-1] == 2 else values[..., :3]
    if values.ndim == 3:
        return _classes_of(values, colours, where)
    if values.size and values.max() > 255:
        _refuse(where, f"has the 16-bit value {values.max()}")
    return values.astype(np.uint8, copy=False)


def label_size(file: File, name: str | None = None) -> tuple[int, int]:
    """The height and width of a label in pixels, from its header; `file` and `name` as in `read_label`."""
    with _open(file, str(name or file), ("PNG",)) as label:
        return label.height, label.width


def encode_png(pixels: np.ndarray) -> bytes:
    """A PNG file of pixels (H, W) or (H, W, 3) uint8."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", compress_level=3)
    return file.getvalue()


def _classes_of(values: np.ndarray, colours: Sequence[Colour], where: str) -> np.ndarray:
    """The classes (H, W) uint8 of an RGB label (H, W, 3) uint8, as `read_label` says."""
    codes = values.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
    counts = collections.Counter(colours)
    known = {(255, 255, 255): IGNORE_LABEL} | {one: k for k, one in enumerate(colours)}
    # What is found nowhere keeps the table from being empty.
    pairs = [(-1, 0), *((int.from_bytes(bytes(one)), k) for one, k in known.items() if counts[one] < 2)]
    found, classes = np.array(sorted(pairs), np.int32).T
    place = np.searchsorted(found, codes).clip(max=len(found) - 1)
    strange = found[place] != codes
    by_colour, by_value = classes[place].astype(np.uint8), values[..., 0]
    grey = (values == by_value[..., None]).all()
    if strange.any() and not grey:
        row, column = (int(k[0]) for k in np.nonzero(strange))
        colour = "#" + bytes(values[row, column]).hex()
        _refuse(where, f"has the colour {colour} in row {row}, column {column}, which is not that of one class")
    if grey and not strange.any() and (by_colour != by_value).any():
        _refuse(where, "is RGB with greys that are the colours of other classes than their values say")
    return by_value if grey else by_colour


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes a picture upright that is loaded; None for nothing, or where its EXIF data cannot be read."""
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # the pixels are there
        return None


def _open(file: File, where: str, formats: tuple[str, ...]) -> ImageFile.ImageFile:
    """Opens a file of one of `formats`, whatever its suffix says, and reads its header."""
    try:
        if isinstance(file, str | os.PathLike):
            about = os.stat(file)
            if not stat.S_ISREG(about.st_mode):  # a pipe would be waited for
                raise UnreadableFileError(f"{where}: not a file; replace or remove it")
            size = about.st_size
        else:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
        image = Image.open(file, formats=formats)
    except UnreadableFileError:
        raise
    except UnidentifiedImageError as error:  # whose message is only the path again
        raise UnreadableFileError(
            f"{where}: its content is not {' or '.join(formats)}; convert, replace or remove it"
        ) from error
    except Exception as error:
        raise _unreadable(where, error) from error
    bits = _BITS.get(str(image.tile[0].args), 8) if image.format == "PNG" and image.tile else 0
    if image.width * image.height * bits > 8 * _MOST_INFLATED * size:
        image.close()
        raise _unreadable(where, ValueError(f"{size} bytes hold no {image.width} x {image.height} pixels"))
    return image


def _refuse(where: str, what: str) -> NoReturn:
    raise UnreadableFileError(f"{where}: the label {what}; save the class of each pixel as one 8-bit value")


def _unreadable(where: str, error: Exception) -> UnreadableFileError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return UnreadableFileError(f"{where}: cannot be read ({reason}); replace or remove it")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to 255 rather than scale
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
