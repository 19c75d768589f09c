"""Reads the annotations of the Semantic Boundaries Dataset, which are MATLAB files.

SciPy's `loadmat` reads them too, but damaged ones can make it crash the whole process.

Source: MathWorks, "MAT-File Format" (level 5): elements of a type, a length and data, of which a matrix holds others.
"""

import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxseg.data.images import UnreadableFileError

# Types of elements; the numeric ones as NumPy names them.
_MATRIX, _COMPRESSED = 14, 15
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
# Classes of matrices.
_STRUCT, _NUMERIC = 2, range(6, 16)
# Bytes beyond which a compressed variable is no annotation: the largest are a hundred times smaller.
_LARGEST = 2**26


class _Element(NamedTuple):
    kind: int
    data: bytes


class _Matrix(NamedTuple):
    kind: int
    shape: tuple[int, ...]
    name: bytes
    parts: Iterator[_Element]


def read_sbd_label(content: bytes, name: str) -> np.ndarray:
    """Reads `GTcls.Segmentation` of a `.mat` file: the VOC class of each pixel.

    Args:
      content: of the file.
      name: what messages call it.

    Returns:
      (H, W) uint8.

    Raises:
      UnreadableFileError: it is damaged or holds something else.
    """
    try:
        label = _read_field(content, b"GTcls", b"Segmentation")
    except (ValueError, zlib.error) as error:
        raise UnreadableFileError(f"{name}: cannot be read as an SBD annotation ({error}); replace it") from error
    if label.ndim != 2 or not label.size or not ((label >= 0) & (label <= 255) & (label == np.floor(label))).all():
        raise UnreadableFileError(f"{name}: its GTcls.Segmentation is no matrix of values in 0..255; replace it")
    return label.astype(np.uint8)


def _read_field(content: bytes, variable: bytes, field: bytes) -> np.ndarray:
    """Reads a numeric field of a struct; ValueError or zlib.error if that cannot be."""
    order = {b"IM": "<", b"MI": ">"}.get(content[126:128])
    if order is None:
        raise ValueError("no MATLAB file of level 5")
    for element in _split(content[128:], order):
        if element.kind == _COMPRESSED:
            element = _next(_split(_decompress(element.data), order))
        if element.kind != _MATRIX:
            continue
        matrix = _open_matrix(element.data, order)
        if matrix.name != variable:
            continue
        if matrix.kind != _STRUCT or set(matrix.shape) != {1}:
            raise ValueError(f"{variable.decode()} is no struct")
        length, names = _next(matrix.parts).data, _next(matrix.parts).data
        step = int(np.frombuffer(length, f"{order}i4", 1)[0])
        if step < 1:
            raise ValueError("field names of no length")
        for start in range(0, len(names), step):
            value = _next(matrix.parts)
            if names[start : start + step].rstrip(b"\0") == field:
                return _read_numbers(_open_matrix(value.data, order), order)
    raise ValueError(f"holds no {variable.decode()}.{field.decode()}")


def _split(data: bytes, order: str) -> Iterator[_Element]:
    """The elements that follow each other."""
    place = 0
    while place + 8 <= len(data):
        kind, size = (int(number) for number in np.frombuffer(data, f"{order}u4", 2, place))
        if kind >> 16:  # a short one, with its length and its data in the same eight bytes
            kind, size, start, end = kind & 0xFFFF, kind >> 16, place + 4, place + 8
        else:
            start = place + 8
            end = start + size
            end += 0 if kind == _COMPRESSED else -size % 8
        if start + size > len(data):
            raise ValueError("cut off")
        yield _Element(kind, data[start : start + size])
        place = end


def _next(parts: Iterator[_Element]) -> _Element:
    element = next(parts, None)
    if element is None:
        raise ValueError("cut off")
    return element


def _open_matrix(data: bytes, order: str) -> _Matrix:
    parts = _split(data, order)
    flags, shape, name = (_next(parts).data for _ in range(3))
    # The class is the lowest byte of the first of two numbers.
    kind = int(np.frombuffer(flags, f"{order}u4", 1)[0]) & 0xFF
    return _Matrix(kind, tuple(np.frombuffer(shape, f"{order}i4").tolist()), name, parts)


def _read_numbers(matrix: _Matrix, order: str) -> np.ndarray:
    element = _next(matrix.parts)
    if matrix.kind not in _NUMERIC or element.kind not in _NUMBERS:
        raise ValueError("not a matrix of numbers")
    # MATLAB writes columns, and may write numbers in a smaller type than the matrix's own.
    numbers = np.frombuffer(element.data, order + _NUMBERS[element.kind])
    return numbers.reshape(matrix.shape, order="F")


def _decompress(data: bytes) -> bytes:
    inflate = zlib.decompressobj()
    content = inflate.decompress(data, _LARGEST)
    if not inflate.eof:
        raise ValueError("its compressed data are cut off or too long")
    return content
