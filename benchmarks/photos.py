"""The images to measure on, in ImageNet's layout: cut from two photographs, or copied from a folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from pipeline.data.folders import list_image_folder

# Around the median of ImageNet's training images, within scikit-learn's photographs of 640x427.
MEDIAN_SIZE_PX = (500, 375)
SPREAD_PX = (60, 40)
MIN_SIZE_PX = (320, 240)
JPEG_QUALITY = 90
NUM_CLASSES = 8


def write_photos(folder: Path, num_images: int) -> None:
    """Write crops of many sizes and places out of scikit-learn's two photographs; the same ones every time."""
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    draws = np.random.default_rng(0)
    for index in range(num_images):
        photo = photos[index % len(photos)]
        size = np.clip(draws.normal(MEDIAN_SIZE_PX, SPREAD_PX), MIN_SIZE_PX, photo.size).astype(int)
        left, top = draws.integers(0, np.array(photo.size) - size + 1)
        crop = photo.crop((left, top, left + size[0], top + size[1]))
        path = folder / f"n{index % NUM_CLASSES:08}" / f"{index:06}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        crop.save(path, quality=JPEG_QUALITY)


def provide_images(source: Path | None, folder: Path, num_images: int) -> None:
    """Copies of those in `source`, or crops of the photographs.

    Raises:
        UserError: `source` is not in ImageNet's layout.
    """
    if source is None:
        write_photos(folder, num_images)
    else:
        copy_images(source, folder, num_images)


def copy_images(source: Path, folder: Path, num_images: int) -> None:
    """Copy up to `num_images` images, spread evenly over a folder in ImageNet's layout.

    Raises:
        UserError: `source` is not in ImageNet's layout.
    """
    images = list_image_folder(source)
    for index in np.unique(np.linspace(0, len(images) - 1, num_images).astype(int)):
        path = folder / images.relative_path(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / images.relative_path(index), path)
