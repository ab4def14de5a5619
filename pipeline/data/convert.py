"""Image folders to .beton files: the original JPEG bytes, untouched, in FFCV's own format.

Threads read, check and hash, which releases the GIL; one loop writes in the folder's order. So
the file does not depend on the number of workers, and no worker process can die alone.
"""

import csv
import errno
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from ffcv.fields import BytesField, IntField, RGBImageField
from ffcv.fields.base import Field

from pipeline import paths
from pipeline.data.beton import IMAGE_MODES, BetonWriter
from pipeline.data.folders import ImageFolder, SegmentationFolder, list_image_folder, list_segmentation_folder
from pipeline.data.manifest import COLUMNS
from pipeline.data.progress import images_progress
from pipeline.data.stored import StoredSample, compact_sample, original_sample, segmentation_sample
from pipeline.errors import UserError

# A thread's portion of work: as many consecutive files as fit both.
CHUNK_BYTES, CHUNK_FILES = 1 << 22, 16


def convert_image_folder(
    folder: str | Path,
    beton: str | Path,
    *,
    storage: Literal["original", "compact"] = "original",
    workers: int,
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
) -> None:
    """Convert a folder in ImageNet's layout to a .beton with the fields `image` and `label`.

    A sample's index follows the sorted order of class folders, then files. `<beton>.manifest.csv`
    lists the samples with the SHA-256 of their stored bytes. Both files appear when they are
    whole; while the conversion runs, and after one that failed, neither is there.

    Args:
        folder: holds one folder of images for each class.
        beton: the file to write.
        storage: `original` keeps plain JPEGs byte for byte and stores anything else as the pixels
            of Pillow's `convert("RGB")`. `compact` shrinks a short side that is longer than
            `COMPACT_SHORT_SIDE_PX` to that with Pillow's Lanczos filter and encodes anew at JPEG
            quality `COMPACT_JPEG_QUALITY`; what is not larger is kept as `original` keeps it.
        workers: threads.
        num_classes: as `list_image_folder` takes it.
        classes: as `list_image_folder` takes it.

    Raises:
        UserError: the folder is not as it should be, an image cannot be read, or the disk is full.
    """
    if storage not in ("original", "compact"):
        raise UserError(f"storage is {storage!r}: choose original or compact")
    images = list_image_folder(folder, num_classes=num_classes, classes=classes)
    read = original_sample if storage == "original" else compact_sample

    def sample(index: int) -> StoredSample:
        return read(f"{images.root}/{images.relative_path(index)}")

    _convert(images, Path(beton), {"image": RGBImageField(), "label": IntField()}, sample, workers)


def convert_segmentation_folder(
    root: str | Path, split: str, beton: str | Path, *, workers: int, num_classes: int
) -> None:
    """Convert one split in ADE20K's layout to a .beton with the fields `image` and `mask`.

    `mask` is the annotation's `(H, W)` uint8 labels as they are in the file: 0 is "other", 1 to
    `num_classes` are the classes. Plain JPEGs are kept byte for byte, any other image is stored as
    OpenCV's decoded pixels. Order, manifest and failure are as for `convert_image_folder`.

    Raises:
        UserError: the folder is not as it should be; an image or an annotation cannot be read; an
            annotation is not 8-bit, is not of its image's size, or has a label above
            `num_classes`; or the disk is full.
    """
    pairs = list_segmentation_folder(root, split)

    def sample(index: int) -> StoredSample:
        image, mask = (f"{pairs.root}/{name}" for name in (pairs.relative_path(index), pairs.label(index)))
        return segmentation_sample(image, mask, num_classes)

    _convert(pairs, Path(beton), {"image": RGBImageField(), "mask": BytesField()}, sample, workers)


def _convert(
    folder: ImageFolder | SegmentationFolder,
    beton: Path,
    fields: dict[str, Field],
    sample: Callable[[int], StoredSample],
    workers: int,
) -> None:
    manifest = paths.manifest(beton)
    partial, partial_manifest = (path.with_name(f"{path.name}.partial") for path in (beton, manifest))
    try:
        beton.parent.mkdir(parents=True, exist_ok=True)
        for path in (beton, manifest):
            path.unlink(missing_ok=True)
        _write(folder, partial, partial_manifest, fields, sample, workers)
        partial_manifest.replace(manifest)
        partial.replace(beton)
    except OSError as error:  # a file that cannot be read is a UserError by here
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            needed_gb = folder.sizes_bytes.sum() / 1e9
            reason += f"; the images to be stored are {needed_gb:.1f} GB: make room and run it again"
        raise UserError(f"{beton} cannot be written: {reason}") from error
    finally:
        partial.unlink(missing_ok=True)
        partial_manifest.unlink(missing_ok=True)


def _write(
    folder: ImageFolder | SegmentationFolder,
    beton: Path,
    manifest: Path,
    fields: dict[str, Field],
    sample: Callable[[int], StoredSample],
    workers: int,
) -> None:
    with (
        manifest.open("w", newline="") as manifest_file,
        BetonWriter(beton, fields, len(folder)) as writer,
        closing(_in_order(sample, folder.sizes_bytes, workers)) as samples,
        images_progress() as progress,
    ):
        rows = csv.writer(manifest_file, lineterminator="\n")
        rows.writerow(COLUMNS)
        task = progress.add_task(f"writing {beton.stem}", total=len(folder))
        for index, ((mode, width, height, blobs), sha256) in enumerate(samples):
            pointers = writer.place(blobs)
            label = folder.label(index)
            image = (IMAGE_MODES.index(mode), width, height, pointers[0])
            second = int(label) if len(blobs) == 1 else (pointers[1], len(blobs[1]))
            writer.metadata[index] = (image, second)
            path, stored_bytes = folder.relative_path(index), sum(map(len, blobs))
            rows.writerow((index, path, label, mode, width, height, stored_bytes, sha256))
            progress.advance(task)
        manifest_file.flush()
        os.fsync(manifest_file.fileno())


def _in_order(
    sample: Callable[[int], StoredSample], sizes_bytes: npt.NDArray[np.int64], workers: int
) -> Generator[tuple[StoredSample, str], None, None]:
    """Every sample with its SHA-256, in order, from threads that stay a few chunks ahead."""

    def run(indices: range) -> list[tuple[StoredSample, str]]:
        return [(stored, stored.sha256()) for stored in map(sample, indices)]

    pending: deque[Future[list[tuple[StoredSample, str]]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for indices in _chunks(sizes_bytes):
                pending.append(pool.submit(run, indices))
                if len(pending) > workers + 2:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _chunks(sizes_bytes: npt.NDArray[np.int64]) -> Iterator[range]:
    """All indices in consecutive runs of up to `CHUNK_FILES` files and about `CHUNK_BYTES`."""
    start, size = 0, 0
    for index, file_bytes in enumerate(sizes_bytes):
        size += int(file_bytes)
        if size >= CHUNK_BYTES or index + 1 - start == CHUNK_FILES:
            yield range(start, index + 1)
            start, size = index + 1, 0
    if start < len(sizes_bytes):
        yield range(start, len(sizes_bytes))
