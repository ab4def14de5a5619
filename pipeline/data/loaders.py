"""Batches from a .beton through FFCV's Loader: the paper's training recipe, and evaluation.

A whole batch is made in one C call. An epoch is the same for any number of workers and ranks, and every image counts
once in evaluation.

Images come out as uint8 `(B, 3, H, W)` in channels_last memory, for the device to normalise, erase
and mix. Each batch owns its memory (FFCV's would be overwritten five batches later).
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from ffcv.reader import Reader
from torch import Tensor

from pipeline.data.beton import open_beton
from pipeline.data.draws import (
    PAPER_AUGMENTATION,
    Ints,
    TrainAugmentation,
    epoch_order,
    eval_plans,
    quasi_random_order,
    train_plans,
)
from pipeline.data.ffcv_loader import InOrderLoader, Read
from pipeline.data.pixels import SOURCE, SampleError, make_batch
from pipeline.errors import UserError

__all__ = ["Batch", "TrainAugmentation", "epoch_order", "eval_loader", "train_loader"]

Records = npt.NDArray[np.void]
Planner = Callable[[Ints, Ints, Ints], Records]  # sample ids, widths, heights -> PLAN records


class Batch(NamedTuple):
    """What the loaders yield; `sample_ids` are positions in the .beton."""

    images: Tensor  # uint8 (B, 3, H, W), channels_last
    labels: Tensor  # int64 (B,)
    sample_ids: Tensor  # int64 (B,)


class BatchLoader(InOrderLoader):
    """Batches of `sample_ids` in this order; each `iter` starts from the first one again."""

    def __init__(
        self, reader: Reader, sample_ids: Ints, batch_size: int, workers: int, image_size: int, plan: Planner
    ) -> None:
        def images(positions: Ints, metadata: Records, storage: Any) -> Tensor:
            try:
                return _make_images(positions, metadata[positions], storage, plan, image_size, workers)
            except SampleError as error:
                raise UserError(
                    f"{reader.file_name}: image {positions[error.position]} cannot be decoded "
                    f"({error.reason}): delete the file and convert again"
                ) from None

        def labels(positions: Ints, metadata: npt.NDArray[np.int64], _: Any) -> Tensor:
            return torch.from_numpy(metadata[positions])

        def ids(positions: Ints, *_: Any) -> Tensor:
            return torch.from_numpy(positions.copy())

        outputs: dict[str, tuple[str, Read]] = {
            "images": ("image", images),
            "labels": ("label", labels),
            "sample_ids": ("label", ids),
        }
        super().__init__(reader, sample_ids, batch_size, outputs)

    def __iter__(self) -> Iterator[Batch]:
        """Raises UserError, with the file and the sample, for an image that cannot be decoded."""
        for outputs in super().__iter__():
            yield Batch(*outputs)


def train_loader(
    beton: str | Path,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    workers: int,
    image_size: int = 224,
    augmentation: TrainAugmentation = PAPER_AUGMENTATION,
    order: Literal["random", "quasi_random"] = "random",
    rank: int = 0,
    world_size: int = 1,
    first_batch: int = 0,
) -> BatchLoader:
    """One epoch of training batches, a pure function of the arguments other than `workers`.

    `batch_size` is the global batch: batch k of the epoch is `order[k * B:(k + 1) * B]`, of which
    each rank yields its share, one after the other. An incomplete last batch is left out.
    `first_batch` starts inside the epoch. `order="quasi_random"` visits the file region by region
    (see `quasi_random_order`), for files that are larger than memory.

    Raises:
        UserError: the file cannot be used, holds less than one batch, or the batch cannot be split.
    """
    if batch_size % world_size:
        raise UserError(f"a global batch of {batch_size} cannot be split over {world_size} ranks: choose a multiple")
    reader = open_beton(beton)
    num_samples = int(reader.num_samples)
    num_batches = num_samples // batch_size
    if not num_batches:
        raise UserError(
            f"{beton} holds {num_samples} images, less than one batch of {batch_size}: choose a smaller batch"
        )
    if order == "random":
        samples = epoch_order(num_samples, seed, epoch)
    else:
        pages = reader.metadata["f0"]["data_ptr"] // reader.page_size
        samples = quasi_random_order(pages, seed, epoch)
    share = batch_size // world_size
    batches = samples[: num_batches * batch_size].reshape(num_batches, world_size, share)

    def plan(sample_ids: Ints, widths: Ints, heights: Ints) -> Records:
        return train_plans(
            augmentation,
            seed=seed,
            epoch=epoch,
            sample_ids=sample_ids,
            widths=widths,
            heights=heights,
            image_size=image_size,
        )

    return BatchLoader(reader, batches[first_batch:, rank].reshape(-1), share, workers, image_size, plan)


def eval_loader(
    beton: str | Path,
    *,
    batch_size: int,
    workers: int,
    image_size: int = 224,
    crop_fraction: float = 0.9,
    rank: int = 0,
    world_size: int = 1,
    first: int = 0,
) -> BatchLoader:
    """Every image of the file once, over all ranks, in the file's order, without padding.

    A rank yields its contiguous share, from image `first` of it on, in batches of `batch_size`, the last one smaller.
    The pixels are those of timm's evaluation transform: the short side to `image_size / crop_fraction`, bicubic, centre
    crop.

    Raises:
        UserError: the file cannot be used.
    """
    reader = open_beton(beton)
    num_samples = int(reader.num_samples)
    start, end = (num_samples * r // world_size for r in (rank, rank + 1))

    def plan(sample_ids: Ints, widths: Ints, heights: Ints) -> Records:
        return eval_plans(widths, heights, image_size=image_size, crop_fraction=crop_fraction)

    return BatchLoader(reader, np.arange(start + first, end, dtype=np.int64), batch_size, workers, image_size, plan)


def _make_images(sample_ids: Ints, rows: Records, storage: Any, plan: Planner, image_size: int, workers: int) -> Tensor:
    file, pointers, sizes = storage
    sources = np.zeros(len(rows), SOURCE)
    sources["data"] = file.ctypes.data + rows["data_ptr"]
    sources["size_bytes"] = sizes[np.searchsorted(pointers, rows["data_ptr"])]
    sources["width"], sources["height"] = rows["width"], rows["height"]
    sources["raw"] = rows["mode"]
    plans = plan(sample_ids, rows["width"].astype(np.int64), rows["height"].astype(np.int64))
    shape = (len(rows), image_size, image_size, 3)
    images = torch.empty(shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    make_batch(sources, plans, images.numpy(), workers)
    return images.permute(0, 3, 1, 2)
