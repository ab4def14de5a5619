"""The manifest beside a .beton: what each sample is and the SHA-256 of its stored bytes."""

import csv
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from pipeline import paths
from pipeline.data.beton import IMAGE_MODES, open_beton
from pipeline.data.progress import images_progress
from pipeline.errors import UserError

COLUMNS = ("index", "path", "label", "mode", "width", "height", "bytes", "sha256")
PORTION = 64
"""Samples that a thread verifies at a time."""


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """One sample.

    `label` is the class's number, or the annotation's path for segmentation. `mode` is `jpg` where
    a JPEG is stored and `raw` where pixels are. `bytes` and `sha256` speak of everything stored for
    the sample: the image, then the mask where there is one.
    """

    index: int
    path: str
    label: str
    mode: str
    width: int
    height: int
    bytes: int
    sha256: str


def read_manifest(beton: str | Path) -> Iterator[ManifestRow]:
    """The rows of a .beton's manifest, in the order of the samples.

    Raises:
        UserError: the manifest is missing or is not one.
    """
    path = paths.manifest(beton)
    if not path.is_file():
        raise UserError(f"{path} is not there: convert again to have it written")
    with path.open(newline="") as file:
        rows = csv.reader(file)
        if tuple(next(rows, ())) != COLUMNS:
            raise UserError(f"{path} is not a manifest: convert again to have it written")
        try:
            for expected, row in enumerate(rows):
                index, name, label, mode, width, height, size, sha256 = row
                if int(index) != expected or mode not in IMAGE_MODES:
                    raise ValueError(row)
                yield ManifestRow(int(index), name, label, mode, int(width), int(height), int(size), sha256)
        except ValueError as error:
            raise UserError(f"{path} is damaged in line {rows.line_num}: convert again") from error


def verify_beton(beton: str | Path) -> int:
    """Hold every sample of a .beton, its bytes and its metadata, against the manifest.

    Returns the number of samples.

    Raises:
        UserError: the .beton is not whole, the manifest speaks of another number of samples, or
            samples have changed; names the first five that have.
    """
    reader = open_beton(beton, fields=None)
    num_samples = int(reader.num_samples)
    allocations = reader.alloc_table.reshape(num_samples, -1)
    has_label = reader.field_names[1] == "label"

    def unchanged(row: ManifestRow) -> bool:
        image, second = reader.metadata[row.index].item()
        starts, sizes = (allocations[row.index][column].tolist() for column in ("ptr", "size"))
        expected = int(row.label) if has_label else (starts[1], sizes[1])
        if image != (IMAGE_MODES.index(row.mode), row.width, row.height, starts[0]):
            return False
        if second != expected or sum(sizes) != row.bytes:
            return False
        digest = hashlib.sha256()
        for start, size in zip(starts, sizes, strict=True):
            digest.update(os.pread(file.fileno(), size, start))  # mapped pages would count as this process's memory
        return digest.hexdigest() == row.sha256

    def those_changed(rows: list[ManifestRow]) -> list[str]:
        return [f"{row.index} ({row.path})" for row in rows if not unchanged(row)]

    rows, checked, changed = read_manifest(beton), 0, list[str]()
    with Path(beton).open("rb") as file, ThreadPoolExecutor() as pool, images_progress() as progress:
        task = progress.add_task(f"verifying {Path(beton).name}", total=num_samples)
        while chunk := list(islice(rows, 16 * PORTION)):
            checked += len(chunk)
            if checked > num_samples:
                break
            portions = [chunk[start : start + PORTION] for start in range(0, len(chunk), PORTION)]
            changed += chain.from_iterable(pool.map(those_changed, portions))
            progress.advance(task, len(chunk))
    if checked != num_samples:
        raise UserError(
            f"{paths.manifest(beton)} does not have one row for each of the {num_samples} samples "
            f"in {beton}: delete both and convert again"
        )
    if changed:
        names = ", ".join(changed[:5]) + (" …" if len(changed) > 5 else "")
        raise UserError(
            f"{beton}: {len(changed)} of {num_samples} samples are not what the manifest says, "
            f"{names}: delete both and convert again"
        )
    return num_samples
