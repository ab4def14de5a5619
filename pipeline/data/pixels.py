"""Decode, crop, resize, flip and RandAugment in C, with the pixels of Pillow 13 and timm 1.0.31.

`make_batch` makes the images of a batch in one call without the GIL. The other functions are thin
doors to its parts, for the tests and the benchmark. Images are uint8 `(H, W, 3)`, RGB.
"""

from __future__ import annotations

import ctypes
import io
import math
from collections.abc import Sequence
from importlib import import_module
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]
Interpolation = Literal["bilinear", "bicubic"]
Box = tuple[int, int, int, int]  # left, top, width, height in pixels

# The structs Op, Plan and Source of native/native.h.
OP = np.dtype([("kind", "i4"), ("cubic", "i4"), ("args", "f8", 6)])
PLAN = np.dtype(
    [
        ("box", "i4", 4),
        ("resized", "i4", 2),
        ("offset", "i4", 2),
        ("cubic", "i4"),
        ("flip", "i4"),
        ("ops", OP, 2),
    ]
)
SOURCE = np.dtype(
    [
        ("data", "u8"),
        ("size_bytes", "u8"),
        ("width", "i4"),
        ("height", "i4"),
        ("raw", "i4"),
        ("padding", "i4"),
    ]
)
_MESSAGE_BYTES = 256

# timm's names of `rand-…-inc1`, in timm's order, with native.h's kinds.
OPERATIONS = {
    "AutoContrast": 1,
    "Equalize": 2,
    "Invert": 3,
    "Rotate": 11,
    "PosterizeIncreasing": 4,
    "SolarizeIncreasing": 5,
    "SolarizeAdd": 6,
    "ColorIncreasing": 7,
    "ContrastIncreasing": 8,
    "BrightnessIncreasing": 9,
    "SharpnessIncreasing": 10,
    "ShearX": 11,
    "ShearY": 11,
    "TranslateXRel": 11,
    "TranslateYRel": 11,
}

_library = ctypes.CDLL(import_module("pipeline.data._pixels").__file__)
_library.make_batch.restype = ctypes.c_int64
_library.philox.restype = None


class SampleError(Exception):
    """A sample that cannot be made into an image: its position in the batch, and why."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(reason)
        self.position = position
        self.reason = reason


def make_batch(sources: npt.NDArray[np.void], plans: npt.NDArray[np.void], out: Pixels, workers: int) -> None:
    """Fill `out` `(B, S, S, 3)` from `SOURCE` and `PLAN` records, on `workers` threads.

    Raises:
        SampleError: for the first sample that cannot be decoded.
    """
    count, size_px = out.shape[:2]
    if not (len(sources) == len(plans) == count and out.flags.c_contiguous):
        raise AssertionError("sources, plans and a contiguous out belong together")
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    failed = _library.make_batch(
        _address(sources),
        _address(plans),
        ctypes.c_int64(count),
        ctypes.c_int32(size_px),
        _address(out),
        ctypes.c_int32(workers),
        message,
    )
    if failed >= 0:
        raise SampleError(failed, message.value.decode())


def decode_jpeg(data: bytes, box: Box | None = None) -> Pixels:
    """The pixels of a JPEG file, or of one box of it: what Pillow's `convert("RGB")` gives.

    Raises:
        SampleError: the file is cut short or broken.
    """
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
    box = box or (0, 0, width, height)
    out = np.empty((box[3], box[2], 3), np.uint8)
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    source = np.zeros(1, SOURCE)
    content = np.frombuffer(data, np.uint8)
    source[0] = (content.ctypes.data, len(data), width, height, 0, 0)
    corners = np.array(box, np.int32)
    if _library.decode(_address(source), _address(corners), _address(out), message):
        raise SampleError(0, message.value.decode())
    return out


def resize_crop(image: Pixels, box: Box, size: int, interpolation: Interpolation, *, flip: bool = False) -> Pixels:
    """Crop `box`, resize it to `(size, size)`, perhaps mirror it: `crop`, `resize` of Pillow."""
    image = np.ascontiguousarray(image)
    height, width = image.shape[:2]
    source, plan = np.zeros(1, SOURCE), np.zeros(1, PLAN)
    source[0] = (image.ctypes.data, image.nbytes, width, height, 1, 0)
    plan["box"], plan["resized"] = box, size
    plan["cubic"], plan["flip"] = interpolation == "bicubic", flip
    out = np.empty((1, size, size, 3), np.uint8)
    make_batch(source, plan, out, workers=1)
    return out[0]


def apply_op(image: Pixels, name: str, value: float, interpolation: Interpolation = "bilinear") -> Pixels:
    """One operation of timm's RandAugment, `value` being the argument that timm's function gets."""
    out = np.array(image, order="C")
    height, width = out.shape[:2]
    record = np.zeros(1, OP)
    record[0] = operation(name, value, interpolation, width, height)
    if _library.apply_operation(_address(out), width, height, _address(record)):
        raise MemoryError
    return out


def philox(key: tuple[int, int], counters: npt.NDArray[np.uint64], blocks: int) -> npt.NDArray[np.uint64]:
    """`(N, 4 * blocks)` random words for the `(N, 4)` counters.

    Row i is `numpy.random.Philox(key=key, counter=counters[i]).random_raw(4 * blocks)`.
    """
    counters = np.ascontiguousarray(counters, np.uint64)
    words = np.empty((len(counters), 4 * blocks), np.uint64)
    _library.philox(
        _address(np.array(key, np.uint64)),
        _address(counters),
        ctypes.c_int64(len(counters)),
        ctypes.c_int64(blocks),
        _address(words),
    )
    return words


def operation(
    name: str, value: float, interpolation: Interpolation, width: int, height: int
) -> tuple[int, bool, Sequence[float]]:
    """The `OP` record of one operation on an image of `width` x `height` px."""
    kind, cubic = OPERATIONS[name], interpolation == "bicubic"
    matrix: tuple[float, ...]
    match name:
        case "ShearX":
            matrix = (1.0, value, 0.0, 0.0, 1.0, 0.0)
        case "ShearY":
            matrix = (1.0, 0.0, 0.0, value, 1.0, 0.0)
        case "TranslateXRel":
            matrix = (1.0, 0.0, value * width, 0.0, 1.0, 0.0)
        case "TranslateYRel":
            matrix = (1.0, 0.0, 0.0, 0.0, 1.0, value * height)
        case "Rotate" if value % 360.0:
            matrix = _rotation(value, width, height)
        case "Rotate":  # Pillow copies
            return 0, cubic, (0.0,) * 6
        case _:
            matrix = (value,) + (0.0,) * 5
    return kind, cubic, matrix


def _rotation(degrees: float, width: int, height: int) -> tuple[float, ...]:
    """The matrix of Pillow's `Image.rotate` about the centre, with its rounding to 15 decimals."""
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    minus_sin = round(-math.sin(angle), 15)
    x, y = width / 2, height / 2
    return (
        cos,
        sin,
        cos * -x + sin * -y + 0.0 + x,
        minus_sin,
        cos,
        minus_sin * -x + cos * -y + 0.0 + y,
    )


def _address(array: npt.NDArray[np.generic]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
