"""What a .beton stores for one image file, and what it takes for the file to be accepted."""

import hashlib
import io
from typing import Literal, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from pipeline.data.pixels import is_whole_jpeg
from pipeline.errors import UserError

# Compact storage. The recipe's random crop (area 0.08-1) has a mean sqrt(area) of 0.71: at 4:3 the average crop has
# to be enlarged to 224 px where the short side is below 224 / 0.71 / sqrt(4/3) = 273. Here that is rounded up to a
# multiple of 32. The evaluation needs 248. What is lost, measured on crops of 500x375 from scikit-learn's photographs:
# evaluation pixels differ from the originals' by 36 dB PSNR at the median, and by 25 dB in the worst twentieth, where
# rounding the width twice moves the crop by half a pixel.
COMPACT_SHORT_SIDE_PX = 288
COMPACT_JPEG_QUALITY = 90
MAX_SIDE_PX = 65535  # FFCV stores sides as 16 bits


class StoredSample(NamedTuple):
    """One sample: an image as `mode` says, in the first blob; perhaps a mask's bytes in a second.

    `width` and `height` are the image's as stored, before any rotation that its EXIF data asks for.
    """

    mode: Literal["jpg", "raw"]
    width: int
    height: int
    blobs: tuple[bytes, ...]

    def sha256(self) -> str:
        """Of all blobs, one after the other."""
        digest = hashlib.sha256()
        for blob in self.blobs:
            digest.update(blob)
        return digest.hexdigest()


def original_sample(place: str, data: bytes) -> StoredSample:
    """A plain JPEG's own bytes; for any other image the RGB pixels of Pillow's `convert("RGB")`.

    Raises UserError, which names the place, if the file is empty, cut short, or no image.
    """
    if size := plain_jpeg_size(_not_empty(place, data)):
        return StoredSample("jpg", *size, (data,))
    image = _pillow_rgb(place, data)
    return StoredSample("raw", *image.size, (image.tobytes(),))


def compact_sample(place: str, data: bytes) -> StoredSample:
    """The image with its short side shrunk to `COMPACT_SHORT_SIDE_PX`, as a new JPEG.

    What is not larger than that is as in `original_sample`. Raises the same errors.
    """
    size = plain_jpeg_size(_not_empty(place, data))
    if size and min(size) <= COMPACT_SHORT_SIDE_PX:
        return StoredSample("jpg", *size, (data,))
    image = _pillow_rgb(place, data)
    if min(image.size) <= COMPACT_SHORT_SIDE_PX:
        return StoredSample("raw", *image.size, (image.tobytes(),))
    scale = COMPACT_SHORT_SIDE_PX / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    shrunk = image.resize((width, height), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    shrunk.save(encoded, "JPEG", quality=COMPACT_JPEG_QUALITY, subsampling="4:2:0")
    return StoredSample("jpg", width, height, (encoded.getvalue(),))


def segmentation_sample(place: str, data: bytes, mask_place: str, mask_data: bytes, num_classes: int) -> StoredSample:
    """A plain JPEG's own bytes, or OpenCV's pixels in RGB; then the mask's `(H, W)` uint8 labels.

    The mask has to fit the image as OpenCV decodes it, that is, rotated if its EXIF data says so.
    Raises UserError, which names the place, if either cannot be decoded or the mask does not fit.
    """
    size = plain_jpeg_size(_not_empty(place, data))
    if size is None:
        _pillow_rgb(place, data)  # OpenCV makes an image even of a file cut short; Pillow refuses
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if pixels is None:
        raise UserError(f"{place} cannot be decoded by OpenCV: replace or remove it")
    height, width = pixels.shape[:2]
    mask = _read_mask(mask_place, mask_data)
    if mask.shape != (height, width):
        raise UserError(f"{mask_place} is {mask.shape[1]}x{mask.shape[0]} px, but its image is {width}x{height}")
    if mask.max() > num_classes:
        raise UserError(f"{mask_place} has the label {mask.max()}; 0 (other) to {num_classes} are expected")
    if size:
        return StoredSample("jpg", *size, (data, mask.tobytes()))
    return StoredSample("raw", width, height, (pixels[..., ::-1].tobytes(), mask.tobytes()))


_EOI, _SOS = 0xD9, 0xDA
_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
_OTHER_FRAMES = (0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
# Bytes that after 0xFF make a marker which ends a scan: not stuffing, a restart marker or fill.
_ENDS_SCAN = np.ones(256, bool)
_ENDS_SCAN[[0x00, *range(0xD0, 0xD8), 0xFF]] = False


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """`(width, height)` of a JPEG that every decoder reads alike; None for anything else.

    Plain is: 8 bits, one or three components, Huffman coding, every marker segment whole from the
    first to the end-of-image marker after the last scan, and every coded bit in order up to there.
    Of a damaged scan libjpeg's versions make different pixels, with warnings that are not shown.
    """
    if data[:3] != b"\xff\xd8\xff":
        return None
    size: tuple[int, int] | None = None
    scan_ends: npt.NDArray[np.int64] | None = None
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker == _EOI or marker in _OTHER_FRAMES:
            return None
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        if marker in _HUFFMAN_FRAMES:
            frame = data[position + 4 : position + 10]
            if size or len(frame) < 6:
                return None
            height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
            if frame[0] != 8 or frame[5] not in (1, 3) or not width or not height:
                return None
            size = (width, height)
        position += 2 + length
        if marker == _SOS:
            scan_ends = _scan_ends(data, position) if scan_ends is None else scan_ends
            following = np.searchsorted(scan_ends, position)
            if following == len(scan_ends) or size is None:
                return None
            position = int(scan_ends[following])
            if data[position + 1] == _EOI:
                return size if is_whole_jpeg(data, *size) else None
    return None


def _scan_ends(data: bytes, start: int) -> npt.NDArray[np.int64]:
    """Where there are markers that end a scan; numpy searches with the GIL released."""
    values = np.frombuffer(data, np.uint8)[start:]
    candidates = np.flatnonzero(values[:-1] == 0xFF)
    return candidates[_ENDS_SCAN[values[candidates + 1]]] + start


def _not_empty(place: str, data: bytes) -> bytes:
    if not data:
        raise UserError(f"{place} is empty: replace or remove it")
    return data


def _pillow_rgb(place: str, data: bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data)) as image:
            rgb = image.convert("RGB")
    except UnidentifiedImageError as error:
        raise UserError(f"{place} is not an image (it begins {data[:16]!r}): replace or remove it") from error
    except Exception as error:  # Pillow's plugins raise what they like on bad data
        raise UserError(f"{place} cannot be decoded ({error}): replace or remove it") from error
    if max(rgb.size) > MAX_SIDE_PX:
        raise UserError(f"{place} is {rgb.width}x{rgb.height} px: FFCV's limit is {MAX_SIDE_PX}")
    return rgb


def _read_mask(place: str, data: bytes) -> npt.NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(_not_empty(place, data))) as image:
            mode, labels = image.mode, np.asarray(image)
    except UserError:
        raise
    except Exception as error:  # Pillow's plugins raise what they like on bad data
        raise UserError(f"{place} cannot be decoded ({error}): replace or remove it") from error
    if mode not in ("L", "P"):
        raise UserError(f"{place} is of mode {mode}; an annotation is an 8-bit PNG, one label for each pixel")
    return labels
