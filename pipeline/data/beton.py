"""FFCV's .beton file, version 2, as ffcv 1.0.2 reads it: opened with checks, written in order.

ffcv's own writer lets its processes race for pages, encodes every JPEG anew, and hangs when one of its processes dies.
This one puts the samples one behind another, so the same samples give the same bytes. The layout: header, field
descriptors, one metadata row for each sample, the samples, the allocation table of `(sample, pointer, bytes)`.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
from ffcv.fields.base import Field
from ffcv.reader import Reader
from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, TYPE_ID_HANDLER, FieldDescType, HeaderType, get_metadata_type

from pipeline.errors import UserError

# ffcv's default. Files with a larger sample get the power of two that holds it.
MIN_PAGE_BYTES = 1 << 23
MAX_PAGE_BYTES = 1 << 31
SCALAR_TYPE_IDS = (0, 1)  # float and int live in the metadata row and allocate nothing
IMAGE_MODES = ("jpg", "raw")  # the position is the code in an image's metadata


def open_beton(path: str | Path, *, fields: Sequence[str] | None = ("image", "label")) -> Reader:
    """Open a .beton with ffcv's Reader after checking that it is whole.

    Args:
        path: the file.
        fields: the fields it has to have, in order; None takes any.

    Raises:
        UserError: the file is missing, is no .beton, is cut short, or has other fields.
    """
    path = Path(path)
    if fields and "label" in fields:
        repro = "dvc repro convert_imagenet"
    else:
        repro = "dvc repro convert_ade20k" if fields else "dvc repro"
    if not path.is_file():
        raise UserError(f"{path} is not there: run {repro}")
    size = path.stat().st_size
    if size < HeaderType.itemsize:
        raise UserError(f"{path} is cut short ({size} bytes): delete it and run {repro}")
    header = np.fromfile(path, HeaderType, 1)[0]
    num_fields, page_bytes = int(header["num_fields"]), int(header["page_size"])
    well_formed = 0 < num_fields <= 64 and page_bytes and not page_bytes & (page_bytes - 1)
    if header["version"] != CURRENT_VERSION or not well_formed:
        raise UserError(f"{path} is not an FFCV file of version {CURRENT_VERSION}: run {repro}")
    # FFCV writes the table's address last: a file that its writer did not finish says 0.
    table, num_samples = int(header["alloc_table_ptr"]), int(header["num_samples"])
    descriptors = np.fromfile(path, FieldDescType, num_fields, offset=HeaderType.itemsize)
    whole = table + num_samples * _allocating(descriptors) * ALLOC_TABLE_TYPE.itemsize
    if len(descriptors) < num_fields or table == 0 or size < whole:
        raise UserError(f"{path} is cut short ({size} of {whole} bytes): delete it and run {repro}")
    if size > whole:
        raise UserError(f"{path} has {size - whole} bytes too many: delete it and run {repro}")
    reader = Reader(str(path))
    if fields is not None and reader.field_names != list(fields):
        raise UserError(f"{path} has the fields {', '.join(reader.field_names)}; {', '.join(fields)} are needed")
    return reader


class BetonWriter:
    """Writes samples to `path`, which is a .beton once the `with` block has ended.

    In order by `place`; or in any order by `write`, after `reserve` was told the sizes of all in order.

    A block that ends with an error leaves the file without a header; the caller removes it.
    """

    def __init__(self, path: Path, fields: Mapping[str, Field], num_samples: int) -> None:
        self.fields = fields
        self.metadata = np.zeros(num_samples, get_metadata_type(list(fields.values())))
        type_ids = {handler: type_id for type_id, handler in TYPE_ID_HANDLER.items()}
        self.descriptors = np.zeros(len(fields), FieldDescType)
        for row, (name, field) in zip(self.descriptors, fields.items(), strict=True):
            row["type_id"] = type_ids[type(field)]
            row["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
        allocating = _allocating(self.descriptors)
        self.allocations = np.zeros((num_samples, allocating), ALLOC_TABLE_TYPE)
        self.page_bytes = MIN_PAGE_BYTES
        self.reserved = self.written = 0
        self.position = _round_up(HeaderType.itemsize + self.descriptors.nbytes + self.metadata.nbytes, MIN_PAGE_BYTES)
        self.file = path.open("wb", buffering=MIN_PAGE_BYTES)
        self.file.seek(self.position)

    def place(self, blobs: Sequence[bytes]) -> list[int]:
        """Write the next sample's blobs, one for each field that allocates; return their pointers."""
        self.reserve([len(blob) for blob in blobs])
        return self.write(self.reserved - 1, blobs)

    def reserve(self, sizes: Sequence[int]) -> None:
        """Give the next sample its place, by the bytes of its blobs.

        No sample crosses a page's border. Pages are of `MIN_PAGE_BYTES` until a sample is larger;
        that one begins at a multiple of the page it needs. What lies inside small pages lies inside
        large ones too, so a single pass will do.
        """
        page_bytes = max(MIN_PAGE_BYTES, 1 << (sum(sizes) - 1).bit_length())
        if page_bytes > MAX_PAGE_BYTES:
            raise UserError(f"a sample of {sum(sizes)} bytes is more than FFCV's {MAX_PAGE_BYTES}")
        self.page_bytes = max(self.page_bytes, page_bytes)
        start = self.position
        if start // page_bytes != (start + sum(sizes) - 1) // page_bytes:
            start = _round_up(start, page_bytes)
        row = self.allocations[self.reserved]
        row["sample_id"], row["size"] = self.reserved, sizes
        row["ptr"] = [start + sum(sizes[:i]) for i in range(len(sizes))]
        self.position = start + sum(sizes)
        self.reserved += 1

    def write(self, index: int, blobs: Sequence[bytes]) -> list[int]:
        """Write a sample where its place was reserved; return the pointers of its blobs."""
        pointers, sizes = (self.allocations[index][column].tolist() for column in ("ptr", "size"))
        if sizes != [len(blob) for blob in blobs]:
            raise UserError(f"sample {index} has changed while it was read: run it again")
        if self.file.tell() != pointers[0]:
            self.file.seek(pointers[0])
        for blob in blobs:
            self.file.write(blob)
        self.written += 1
        return list(pointers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            self.file.close()

    def _finish(self) -> None:
        if self.written != len(self.metadata):
            raise AssertionError(f"{self.written} of {len(self.metadata)} samples were written")
        header = np.zeros(1, HeaderType)
        header["version"], header["num_fields"] = CURRENT_VERSION, len(self.fields)
        header["page_size"], header["num_samples"] = self.page_bytes, self.written
        header["alloc_table_ptr"] = self.position
        self.file.seek(self.position)
        self.file.write(self.allocations.view(np.uint8).data)
        self.file.seek(0)
        for part in (header, self.descriptors, self.metadata):
            self.file.write(part.view(np.uint8).data)
        self.file.flush()
        os.fsync(self.file.fileno())


def _allocating(descriptors: npt.NDArray[np.void]) -> int:
    """How many of the fields have bytes of their own outside the metadata."""
    return int(np.count_nonzero(~np.isin(descriptors["type_id"], SCALAR_TYPE_IDS)))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
