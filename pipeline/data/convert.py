"""Images to .beton files: the original JPEG bytes, untouched, in FFCV's own format.

Threads read, check and hash, which releases the GIL; one loop writes. So the file does not depend
on the number of workers, and no worker process can die alone.
"""

import csv
import errno
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from ffcv.fields import BytesField, IntField, RGBImageField
from ffcv.fields.base import Field

from pipeline import paths
from pipeline.data.beton import IMAGE_MODES, BetonWriter
from pipeline.data.folders import LabelledImages, Listed, ReadableImages, list_image_folder
from pipeline.data.manifest import COLUMNS
from pipeline.data.parquet import ParquetImages, RowGroup
from pipeline.data.progress import images_progress
from pipeline.data.segmentation_files import files_at, list_segmentation_images
from pipeline.data.stored import StoredSample, compact_sample, original_sample, segmentation_sample
from pipeline.errors import UserError

# A thread's portion of work: as many consecutive files as fit both.
CHUNK_BYTES, CHUNK_FILES = 1 << 22, 16
IN_FLIGHT_BYTES = 1 << 31
"""Of parquet row groups, all threads together."""
P = TypeVar("P")
R = TypeVar("R")


def convert_image_folder(
    folder: str | Path,
    beton: str | Path,
    *,
    storage: Literal["original", "compact"] = "original",
    workers: int,
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
) -> None:
    """Convert a folder in ImageNet's layout to a .beton: `convert_images` of `list_image_folder`."""
    images = list_image_folder(folder, num_classes=num_classes, classes=classes)
    convert_images(images, beton, storage=storage, workers=workers)


def convert_images(
    images: LabelledImages,
    beton: str | Path,
    *,
    storage: Literal["original", "compact"] = "original",
    workers: int,
) -> None:
    """Convert labelled images to a .beton with the fields `image` and `label`.

    A sample's index follows the sorted order of classes, then files, whatever the images lie in.
    `<beton>.manifest.csv` lists the samples with the SHA-256 of their stored bytes. Both files appear
    when they are whole; while the conversion runs, and after one that failed, neither is there.

    Args:
        images: in a folder, a tar file, or parquet files; these last are read twice.
        beton: the file to write.
        storage: `original` keeps plain JPEGs byte for byte and stores anything else as the pixels
            of Pillow's `convert("RGB")`. `compact` shrinks a short side that is longer than
            `COMPACT_SHORT_SIDE_PX` to that with Pillow's Lanczos filter and encodes anew at JPEG
            quality `COMPACT_JPEG_QUALITY`; what is not larger is kept as `original` keeps it.
        workers: threads.

    Raises:
        UserError: an image cannot be read, or the disk is full.
    """
    if storage not in ("original", "compact"):
        raise UserError(f"storage is {storage!r}: choose original or compact")
    store = original_sample if storage == "original" else compact_sample
    fields = {"image": RGBImageField(), "label": IntField()}
    if isinstance(images, ParquetImages):
        with _placed(images, Path(beton)) as (partial, manifest):
            _write_sorted(images, partial, manifest, fields, store, workers)
        return
    assert isinstance(images, ReadableImages)

    def sample(index: int) -> StoredSample:
        return store(images.place(index), images.read(index))

    with _placed(images, Path(beton)) as (partial, manifest):
        _write(images, partial, manifest, fields, sample, workers)


def convert_segmentation_folder(
    root: str | Path, split: str, beton: str | Path, *, workers: int, num_classes: int
) -> None:
    """Convert one split in ADE20K's layout, a folder or a zip file, to a .beton with the fields `image` and `mask`.

    `mask` is the annotation's `(H, W)` uint8 labels as they are in the file: 0 is "other", 1 to
    `num_classes` are the classes. Plain JPEGs are kept byte for byte, any other image is stored as
    OpenCV's decoded pixels. Order, manifest and failure are as for `convert_images`.

    Raises:
        UserError: the folder is not as it should be; an image or an annotation cannot be read; an
            annotation is not 8-bit, is not of its image's size, or has a label above
            `num_classes`; or the disk is full.
    """
    files = files_at(root)
    pairs = list_segmentation_images(files, split)

    def sample(index: int) -> StoredSample:
        image, mask = pairs.relative_path(index), pairs.label(index)
        return segmentation_sample(
            files.place(image), files.read(image), files.place(mask), files.read(mask), num_classes
        )

    with _placed(pairs, Path(beton)) as (partial, manifest):
        _write(pairs, partial, manifest, {"image": RGBImageField(), "mask": BytesField()}, sample, workers)


@contextmanager
def _placed(images: Listed, beton: Path) -> Iterator[tuple[Path, Path]]:
    """Yield where to write a .beton and its manifest; both are put into place if the block ends without an error."""
    manifest = paths.manifest(beton)
    partial, partial_manifest = (path.with_name(f"{path.name}.partial") for path in (beton, manifest))
    try:
        beton.parent.mkdir(parents=True, exist_ok=True)
        for path in (beton, manifest):
            path.unlink(missing_ok=True)
        yield partial, partial_manifest
        partial_manifest.replace(manifest)
        partial.replace(beton)
    except OSError as error:  # a file that cannot be read is a UserError by here
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            needed_gb = images.total_bytes() / 1e9
            reason += f"; the images to be stored are {needed_gb:.1f} GB: make room and run it again"
        raise UserError(f"{beton} cannot be written: {reason}") from error
    finally:
        partial.unlink(missing_ok=True)
        partial_manifest.unlink(missing_ok=True)


def _write(
    images: Listed,
    beton: Path,
    manifest: Path,
    fields: dict[str, Field],
    sample: Callable[[int], StoredSample],
    workers: int,
) -> None:
    def run(indices: range) -> list[tuple[StoredSample, str]]:
        return [(stored, stored.sha256()) for stored in map(sample, indices)]

    with (
        _manifest(manifest) as rows,
        BetonWriter(beton, fields, len(images)) as writer,
        closing(_in_turn(run, _chunks(images.sizes_bytes()), workers)) as portions,
        images_progress() as progress,
    ):
        task = progress.add_task(f"writing {beton.stem}", total=len(images))
        for index, (stored, sha256) in enumerate(chain.from_iterable(portions)):
            pointers = writer.place(stored.blobs)
            second = int(images.label(index)) if len(stored.blobs) == 1 else (pointers[1], len(stored.blobs[1]))
            facts = (stored.mode, stored.width, stored.height, sum(map(len, stored.blobs)), sha256)
            _describe(writer, rows, images, index, facts, (pointers[0], second))
            progress.advance(task)


def _write_sorted(
    images: ParquetImages,
    beton: Path,
    manifest: Path,
    fields: dict[str, Field],
    store: Callable[[str, bytes], StoredSample],
    workers: int,
) -> None:
    """Images that come in another order: read once for the size of each, and again to write each in its place."""

    def stored(group: RowGroup) -> Iterator[tuple[int, StoredSample]]:
        return ((index, store(images.place(index), data)) for index, data in group.images())

    def measure(group: RowGroup) -> list[tuple[int, int]]:
        return [(index, len(sample.blobs[0])) for index, sample in stored(group)]

    def run(group: RowGroup) -> list[tuple[int, StoredSample, str]]:
        return [(index, sample, sample.sha256()) for index, sample in stored(group)]

    sizes = np.zeros(len(images), np.int64)
    found = np.zeros(len(images), [("mode", "U3"), ("width", "u4"), ("height", "u4"), ("sha256", "S64")])
    workers = min(workers, images.at_once(IN_FLIGHT_BYTES))
    with (
        _manifest(manifest) as rows,
        BetonWriter(beton, fields, len(images)) as writer,
        closing(_in_turn(measure, images.row_groups, workers)) as measured,
        closing(_in_turn(run, images.row_groups, workers)) as samples,
        images_progress() as progress,
    ):
        task = progress.add_task(f"measuring {beton.stem}", total=len(images))
        for portion in measured:
            for index, size in portion:
                sizes[index] = size
            progress.advance(task, len(portion))
        for size in sizes.tolist():
            writer.reserve([size])
        task = progress.add_task(f"writing {beton.stem}", total=len(images))
        for written in samples:
            for index, sample, sha256 in written:
                writer.write(index, sample.blobs)
                found[index] = (sample.mode, sample.width, sample.height, sha256)
            progress.advance(task, len(written))
        for index, (mode, width, height, digest) in enumerate(found):
            pointer = int(writer.allocations[index]["ptr"][0])
            facts = (str(mode), int(width), int(height), int(sizes[index]), digest.decode())
            _describe(writer, rows, images, index, facts, (pointer, int(images.label(index))))


@contextmanager
def _manifest(path: Path) -> Iterator[Any]:
    """A CSV writer, past the heading."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(COLUMNS)
        yield rows
        file.flush()
        os.fsync(file.fileno())


def _describe(
    writer: BetonWriter,
    rows: Any,
    images: Listed,
    index: int,
    facts: tuple[str, int, int, int, str],
    fields: tuple[int, Any],
) -> None:
    """A sample's row in the .beton's metadata, and the one in the manifest."""
    mode, width, height, stored_bytes, sha256 = facts
    pointer, second = fields
    writer.metadata[index] = ((IMAGE_MODES.index(mode), width, height, pointer), second)
    rows.writerow((index, images.relative_path(index), images.label(index), mode, width, height, stored_bytes, sha256))


def _in_turn(run: Callable[[P], R], portions: Iterable[P], workers: int) -> Generator[R, None, None]:
    """What `run` makes of every portion, in order, from threads that stay a few portions ahead."""
    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for portion in portions:
                pending.append(pool.submit(run, portion))
                if len(pending) > workers + 2:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
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
