"""What mmsegmentation's pipeline for ADE20K does to one sample, with OpenCV's own pixels.

The steps, their order and their rounding are those of mmseg's fpn_poolformer configurations. Images are BGR uint8 `(H,
W, 3)`; masks are uint8 `(H, W)` with the labels of the annotation files, where 0 is "other" and is never scored.
"""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[Any]  # uint8: OpenCV is typed no further

CROP_TRIES = 10
# mmseg's PhotoMetricDistortion. Hue is in steps of OpenCV's 8-bit HSV, 180 to the circle, and its
# upper end is excluded.
BRIGHTNESS_DELTA, CONTRAST_RANGE, SATURATION_RANGE, HUE_DELTA = 32, (0.5, 1.5), (0.5, 1.5), 18


@dataclass(frozen=True)
class SegmentationAugmentation:
    """The training pipeline's parameters; the defaults are the paper's on ADE20K."""

    scale: tuple[int, int] = (2048, 512)
    """Longest and shortest side, in px, that the image is resized into, keeping its ratio."""
    ratio_range: tuple[float, float] = (0.5, 2.0)
    """`scale` is multiplied by a uniform draw from this range."""
    crop_size: int = 512
    """Side of the square crop, in px."""
    cat_max_ratio: float = 0.75
    """A crop is drawn again while one class fills this share of its labelled pixels."""
    hflip: float = 0.5
    """Probability of a mirror image."""
    photometric: bool = True
    """Whether brightness, contrast, saturation and hue are distorted."""


def augment(
    image: Pixels, mask: Pixels, random: np.random.Generator, how: SegmentationAugmentation
) -> tuple[Pixels, Pixels]:
    """A random crop of at most `crop_size` on each side, and its mask."""
    ratio = random.uniform(*how.ratio_range)
    image = resize_into(image, how.scale, ratio, cv2.INTER_LINEAR)
    mask = resize_into(mask, how.scale, ratio, cv2.INTER_NEAREST)
    crop = draw_crop(mask, random, how.crop_size, how.cat_max_ratio)
    image, mask = image[crop], mask[crop]
    if random.random() < how.hflip:
        image, mask = image[:, ::-1], mask[:, ::-1]
    if how.photometric:
        image = distort(np.ascontiguousarray(image), random)
    return image, mask


def resize_into(pixels: Pixels, scale: tuple[int, int], ratio: float, mode: int) -> Pixels:
    """Resize, keeping the ratio, so that long and short side just fit into `scale` times `ratio`."""
    height, width = pixels.shape[:2]
    long_px, short_px = (int(side * ratio) for side in scale)
    factor = min(long_px / max(height, width), short_px / min(height, width))
    size = (int(width * factor + 0.5), int(height * factor + 0.5))
    return cv2.resize(pixels, size, interpolation=mode)


def resize_to_multiple(pixels: Pixels, divisor: int) -> Pixels:
    """Resize both sides up to the next multiple of `divisor`."""
    height, width = (-(-side // divisor) * divisor for side in pixels.shape[:2])
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)


def draw_crop(mask: Pixels, random: np.random.Generator, crop_size: int, cat_max_ratio: float) -> tuple[slice, slice]:
    """Draw a crop's place, and up to ten times another while one class fills too much of it."""
    for tries_left in reversed(range(CROP_TRIES + 1)):
        top, left = (int(random.integers(max(side - crop_size, 0) + 1)) for side in mask.shape)
        crop = (slice(top, top + crop_size), slice(left, left + crop_size))
        if not tries_left or cat_max_ratio >= 1:
            break
        labelled = np.bincount(mask[crop].ravel(), minlength=256)[1:]
        if np.count_nonzero(labelled) > 1 and labelled.max() / labelled.sum() < cat_max_ratio:
            break
    return crop


def distort(image: Pixels, random: np.random.Generator) -> Pixels:
    """Brightness, contrast, saturation and hue, each with probability 0.5.

    Contrast comes before or after the other two, as likely the one as the other. Each step ends in
    8 bits, rounded down; so each is a table of 256 values.
    """
    if random.integers(2):
        beta = random.uniform(-BRIGHTNESS_DELTA, BRIGHTNESS_DELTA)
        image = cv2.LUT(image, _linear_table(1, beta))
    contrast_first = random.integers(2)
    if contrast_first and random.integers(2):
        image = cv2.LUT(image, _linear_table(random.uniform(*CONTRAST_RANGE), 0))
    if random.integers(2):
        image = _map_hsv(image, 1, _linear_table(random.uniform(*SATURATION_RANGE), 0))
    if random.integers(2):
        hues = (np.arange(256) + random.integers(-HUE_DELTA, HUE_DELTA)) % 180
        image = _map_hsv(image, 0, hues.astype(np.uint8))
    if not contrast_first and random.integers(2):
        image = cv2.LUT(image, _linear_table(random.uniform(*CONTRAST_RANGE), 0))
    return image


def _linear_table(alpha: float, beta: float) -> Pixels:
    """mmseg's float32 arithmetic for each of the 256 values."""
    values = np.arange(256, dtype=np.float32) * np.float32(alpha) + np.float32(beta)
    return np.clip(values, 0, 255).astype(np.uint8)


def _map_hsv(image: Pixels, channel: int, table: Pixels) -> Pixels:
    hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
    hsv[..., channel] = cv2.LUT(hsv[..., channel], table)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
