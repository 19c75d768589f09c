"""Reads images and labels, from files or from memory: each as a user would expect, or refused by name."""

import os
import struct
import zlib
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

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
# What Pillow raises, besides OSError, for the many ways in which a file can be damaged.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class UnreadableFileError(ValueError):
    """An image or a label that cannot be read; the message names it and the remedy."""


def read_image(file: File, name: str | None = None) -> np.ndarray:
    """Reads a JPEG or PNG as 8-bit RGB, turned upright as its EXIF orientation says.

    Transparent pixels are shown on white; 16-bit values keep their upper 8 bits.

    Args:
      file: a path, or an open file.
      name: what messages call it; needed for an open file.

    Returns:
      (H, W, 3) uint8.

    Raises:
      ValueError: the file cannot be read.
    """
    with _open(file, name, ("JPEG", "PNG")) as image:
        try:
            turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
            rgb = _to_rgb(image)
            return np.asarray(rgb if turn is None else rgb.transpose(turn))
        except _DECODE_ERRORS as error:
            raise _unreadable(name or file, error) from error


def read_label(file: File, name: str | None = None) -> np.ndarray:
    """Reads a label: the values of an 8-bit grey PNG, the indices (not the colours) of a palette PNG.

    Args:
      file: a path, or an open file.
      name: what messages call it; needed for an open file.

    Returns:
      (H, W) uint8.

    Raises:
      ValueError: the file cannot be read, or has another mode.
    """
    with _open(file, name, ("PNG",)) as label:
        if label.mode not in ("L", "P"):
            raise ValueError(
                f"{name or file}: a label must be an 8-bit grey or palette PNG, and this has mode {label.mode}:"
                " save the class of each pixel as one 8-bit value"
            )
        # Pillow stretches grey values of 2 and 4 bits to 0..255, and would change the classes.
        if label.mode == "L" and label.tile and label.tile[0].args != "L":
            raise ValueError(
                f"{name or file}: a grey label of fewer than 8 bits: save the class of each pixel as one 8-bit value"
            )
        try:
            return np.asarray(label)
        except _DECODE_ERRORS as error:
            raise _unreadable(name or file, error) from error


def label_size(file: File, name: str | None = None) -> tuple[int, int]:
    """The height and width of a label in pixels, from its header; `file` and `name` as in `read_label`."""
    with _open(file, name, ("PNG",)) as label:
        return label.height, label.width


def _open(file: File, name: str | None, formats: tuple[str, ...]) -> ImageFile.ImageFile:
    """Opens a file of one of `formats`, whatever its name says, and reads its header."""
    try:
        return Image.open(file, formats=formats)
    except UnidentifiedImageError as error:  # whose message is only the path again
        raise UnreadableFileError(
            f"{name or file}: its content is not {' or '.join(formats)}; convert, replace or remove it"
        ) from error
    except _DECODE_ERRORS as error:
        raise _unreadable(name or file, error) from error


def _unreadable(name: File, error: Exception) -> UnreadableFileError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return UnreadableFileError(f"{name}: cannot be read ({reason}); replace or remove it")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to 255 rather than scale
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
