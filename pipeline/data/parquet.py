"""ImageNet in parquet files, as the Hub has it (ILSVRC/imagenet-1k): columns `image: {bytes, path}` and `label`.

Images come in the order of the shards, which is random, and a row group can only be read as a whole; so everything is
read from front to back, and sorted by where it is written.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.folders import LabelledImages, check_classes
from pipeline.data.progress import images_progress
from pipeline.errors import UserError

HUB_SPLITS = {"train": "train", "val": "validation"}
SHARD = re.compile(r".*-(\d{5})-of-(\d{5})(-[0-9a-f]+)?\.parquet")
NAME = re.compile(r"(?P<name>.+)_(?P<synset>n\d{8})\.JPEG")
"""Of an image's path there: ImageNet's own file name with the synset behind it."""
ROWS = 64
"""Read at a time."""


@dataclass(frozen=True)
class RowGroup:
    """Consecutive rows of a shard; `indices` int64 `(R,)` are where its images stand in the sorted order."""

    shard: Path
    number: int
    size_bytes: int
    """Of all its columns."""
    indices: npt.NDArray[np.int64]

    def images(self) -> Iterator[tuple[int, bytes]]:
        """Every image's index and bytes, in the order of the rows."""
        rows = iter(self.indices.tolist())
        for images in self._columns():
            for data in images.field("bytes"):
                yield next(rows), data.as_py()

    def sizes_bytes(self) -> npt.NDArray[np.int64]:
        """Of the images, `(R,)`, in the order of the rows."""
        sizes = [pc.binary_length(images.field("bytes")).to_numpy() for images in self._columns()]
        return np.concatenate(sizes).astype(np.int64)

    def _columns(self) -> Iterator[pa.StructArray]:
        try:
            with pq.ParquetFile(self.shard) as file:
                for batch in file.iter_batches(ROWS, row_groups=[self.number], columns=["image.bytes"]):
                    images = batch.column("image")
                    if images.field("bytes").null_count:
                        raise UserError(f"{self.shard} has rows without an image's bytes: fetch it again")
                    yield images
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{self.shard} cannot be read ({error}): fetch it again") from error


@dataclass(frozen=True)
class ParquetImages(LabelledImages):
    """`root` is the folder of the shards."""

    row_groups: list[RowGroup]

    def place(self, index: int) -> str:
        return f"{self.relative_path(index)} in {self.root}"

    def at_once(self, limit_bytes: int) -> int:
        """How many row groups fit into so much memory, at least one."""
        return max(1, limit_bytes // max(group.size_bytes for group in self.row_groups))

    def total_bytes(self) -> int:
        """Of the shards, which is hardly more."""
        return sum(shard.stat().st_size for shard in {group.shard for group in self.row_groups})

    def sizes_bytes(self) -> npt.NDArray[np.int64]:
        """Of the images' files, `(N,)`: reads them all."""
        sizes = np.zeros(len(self), np.int64)
        with images_progress() as progress:
            task = progress.add_task(f"measuring {self.root.name}", total=len(self))
            for group in self.row_groups:
                sizes[group.indices] = group.sizes_bytes()
                progress.advance(task, len(group.indices))
        return sizes


def list_parquet(
    root: Path,
    split: str,
    *,
    synsets: Sequence[str],
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
) -> ParquetImages:
    """List the images of a split by the shards' columns `image.path` and `label`.

    Args:
        root: holds the shards, `train-00000-of-00294.parquet` and so on, or `data/` with them.
        split: `train` or `val`.
        synsets: what the numbers in `label` stand for, where a path does not say it.
        num_classes, classes: as `list_image_folder` takes them.

    Raises:
        UserError: a shard is missing or damaged, has other columns, or labels that its paths contradict; or the
            classes are not those expected.
    """
    shards = find_shards(root, split)
    names: list[str] = []
    found: list[str] = []
    groups: list[tuple[Path, int, int, int]] = []
    for shard in shards:
        try:
            with pq.ParquetFile(shard) as file:
                table = file.read(columns=["image.path", "label"])
                numbers = table.column("label").to_pylist()
                paths = table.column("image").combine_chunks().field("path").to_pylist()
                parts = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        except (OSError, pa.ArrowException, KeyError) as error:
            raise UserError(
                f"{shard} is not a shard of ILSVRC/imagenet-1k ({error!r}): it has the columns image (bytes, path) and "
                "label; fetch it again"
            ) from error
        for path, number in zip(paths, numbers, strict=True):
            name, synset = _name_and_synset(shard, path, number, len(names), split, synsets)
            names.append(name)
            found.append(synset)
        groups.extend((shard, number, part.total_byte_size, part.num_rows) for number, part in enumerate(parts))
    present = tuple(sorted(set(found)))
    check_classes(shards[0].parent, present, num_classes, classes)
    position = {synset: label for label, synset in enumerate(present)}
    labels = np.fromiter(map(position.__getitem__, found), np.int32, len(found))
    order = np.array(sorted(range(len(names)), key=lambda row: (found[row], names[row])), np.int64)
    indices = np.empty_like(order)
    indices[order] = np.arange(len(order))
    ends = np.cumsum([count for *_, count in groups])
    row_groups = [
        RowGroup(shard, number, size, indices[end - count : end])
        for (shard, number, size, count), end in zip(groups, ends, strict=True)
    ]
    return ParquetImages(shards[0].parent, present, [names[row] for row in order], labels[order], row_groups)


def find_shards(root: Path, split: str) -> list[Path]:
    """The shards of `train` or `val`, in order.

    Raises:
        UserError: there are none, or not as many as their names say.
    """
    hub = HUB_SPLITS[split]
    for folder in (root / "data", root):
        matches = {path: SHARD.fullmatch(path.name) for path in sorted(folder.glob(f"{hub}-*.parquet"))}
        numbered = {path: (int(match[1]), int(match[2])) for path, match in matches.items() if match}
        if not numbered:
            continue
        totals = {total for _, total in numbered.values()}
        total = max(totals)
        if missing := sorted(set(range(total)) - {number for number, _ in numbered.values()}):
            raise UserError(
                f"{folder} has {len(numbered)} of {total} shards: {hub}-{missing[0]:05d}-of-{total:05d}.parquet is "
                "missing; fetch the rest"
            )
        if len(totals) > 1 or len(numbered) > total:
            raise UserError(f"{folder} has {hub}'s shards twice, of different fetches: remove one of them")
        return list(numbered)
    raise UserError(
        f"{root} has no {hub}-00000-of-….parquet, and {root / 'data'} neither: put the Hub's shards there or correct "
        "imagenet.root"
    )


def _name_and_synset(
    shard: Path, path: str | None, number: int, row: int, split: str, synsets: Sequence[str]
) -> tuple[str, str]:
    """ImageNet's own file name of an image, and its class."""
    if not 0 <= number < len(synsets):
        raise UserError(
            f"{shard} has the label {number}: 0 to {len(synsets) - 1} are ImageNet's (-1 is its test split)"
        )
    match = NAME.fullmatch(Path(path).name) if path else None
    if match is None:
        return f"{split}_{row:08d}.JPEG", synsets[number]
    if match["synset"] != synsets[number]:
        raise UserError(f"{shard}: {path} has the label {number}, which is {synsets[number]}")
    return f"{match['name']}.JPEG", match["synset"]
