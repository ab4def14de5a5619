"""Decode, crop, resize, flip and RandAugment in C, with the pixels of Pillow 13 and timm 1.0.31.

`make_batch` makes the images of a batch in one call without the GIL. The other functions are thin
doors to its parts, for the tests and the benchmark. Images are uint8 `(H, W, 3)`, RGB.
"""

import ctypes
import io
import math
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from numpy.ctypeslib import ndpointer
from PIL import Image

Pixels = npt.NDArray[np.uint8]
Interpolation = Literal["bilinear", "bicubic"]
Box = tuple[int, int, int, int]  # left, top, width, height in pixels

# The structs Op, Plan and Source of native/native.h.
OP = np.dtype([("kind", "i4"), ("cubic", "i4"), ("args", "f8", 6)])
PLAN = np.dtype(
    [("box", "i4", 4), ("resized", "i4", 2), ("offset", "i4", 2), ("cubic", "i4"), ("flip", "i4"), ("ops", OP, 2)]
)
SOURCE = np.dtype(
    [("data", "u8"), ("size_bytes", "u8"), ("width", "i4"), ("height", "i4"), ("raw", "i4"), ("padding", "i4")]
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

# Arrays go to C as themselves, never as addresses: a call lets go of the GIL, and an array that nothing else refers to
# would be freed, and its memory used again, before C has read it.
_sources = ndpointer(SOURCE, ndim=1, flags="C_CONTIGUOUS")
_plans = ndpointer(PLAN, ndim=1, flags="C_CONTIGUOUS")
_operation = ndpointer(OP, ndim=1, flags="C_CONTIGUOUS")
_image = ndpointer(np.uint8, ndim=3, flags=("C_CONTIGUOUS", "WRITEABLE"))
_images = ndpointer(np.uint8, ndim=4, flags=("C_CONTIGUOUS", "WRITEABLE"))
_box = ndpointer(np.int32, shape=(4,), flags="C_CONTIGUOUS")
_key = ndpointer(np.uint64, shape=(2,), flags="C_CONTIGUOUS")
_words = ndpointer(np.uint64, ndim=2, flags="C_CONTIGUOUS")

_library: Any = ctypes.CDLL(import_module("pipeline.data._pixels").__file__)
_library.make_batch.argtypes = [
    _sources, _plans, ctypes.c_int64, ctypes.c_int32, _images, ctypes.c_int32, ctypes.c_char_p,
]  # fmt: skip
_library.make_batch.restype = ctypes.c_int64
_library.decode.argtypes = [_sources, _box, _image, ctypes.c_char_p]
_library.decode.restype = ctypes.c_int32
_library.is_whole.argtypes = [_sources]
_library.is_whole.restype = ctypes.c_int32
_library.apply_operation.argtypes = [_image, ctypes.c_int32, ctypes.c_int32, _operation]
_library.apply_operation.restype = ctypes.c_int32
_library.philox.argtypes = [_key, _words, ctypes.c_int64, ctypes.c_int64, _words]
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
    if not len(sources) == len(plans) == count:
        raise AssertionError("sources, plans and out belong together")
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    failed = _library.make_batch(sources, plans, count, size_px, out, workers, message)
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
    if _library.decode(source, np.array(box, np.int32), out, message):
        raise SampleError(0, message.value.decode())
    return out


def is_whole_jpeg(data: bytes, width: int, height: int) -> bool:
    """Whether every bit of a JPEG of this size is in order, so that all decoders make the same pixels of it."""
    content, source = np.frombuffer(data, np.uint8), np.zeros(1, SOURCE)
    source[0] = (content.ctypes.data, len(data), width, height, 0, 0)
    answer: int = _library.is_whole(source)
    if answer < 0:
        raise MemoryError
    return answer == 1


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
    if _library.apply_operation(out, width, height, record):
        raise MemoryError
    return out


def philox(key: tuple[int, int], counters: npt.NDArray[np.uint64], blocks: int) -> npt.NDArray[np.uint64]:
    """`(N, 4 * blocks)` random words for the `(N, 4)` counters.

    Row i is `numpy.random.Philox(key=key, counter=counters[i]).random_raw(4 * blocks)`.
    """
    counters = np.ascontiguousarray(counters, np.uint64)
    words = np.empty((len(counters), 4 * blocks), np.uint64)
    _library.philox(np.array(key, np.uint64), counters, len(counters), blocks, words)
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
    return (cos, sin, cos * -x + sin * -y + 0.0 + x, minus_sin, cos, minus_sin * -x + cos * -y + 0.0 + y)
