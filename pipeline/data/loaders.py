"""Batches from a .beton through FFCV's Loader: the paper's training recipe, and evaluation.

FFCV reads the file and runs ahead of the consumer in a thread of its own; the operation here makes
a whole batch in one C call. Which samples a batch holds is decided before FFCV sees them, so that
an epoch is the same for any number of workers and ranks, and every image counts once in evaluation.

Images come out as uint8 `(B, 3, H, W)` in channels_last memory, for the device to normalise, erase
and mix. Each batch has memory of its own (FFCV's would be overwritten five batches later).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
import torch
from ffcv.loader import Loader
from ffcv.memory_managers.os_cache import OSCacheContext, OSCacheManager
from ffcv.pipeline import Compiler, PipelineSpec
from ffcv.pipeline.graph import Graph
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State
from ffcv.reader import Reader
from ffcv.traversal_order import Sequential
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
from pipeline.data.pixels import SOURCE, SampleError, make_batch
from pipeline.errors import UserError

__all__ = ["Batch", "TrainAugmentation", "epoch_order", "eval_loader", "train_loader"]

Records = npt.NDArray[np.void]
Planner = Callable[[Ints, Ints, Ints], Records]  # sample ids, widths, heights -> PLAN records
_compiler_setting = Lock()


class Batch(NamedTuple):
    """What the loaders yield; `sample_ids` are positions in the .beton."""

    images: Tensor  # uint8 (B, 3, H, W), channels_last
    labels: Tensor  # int64 (B,)
    sample_ids: Tensor  # int64 (B,)


class BatchLoader(Loader):
    """FFCV's Loader over `sample_ids` in this order; each `iter` starts from the first one again.

    Its constructor is not called: that would map every sample to its page, for a memory manager
    that is not used here, and take 4 s and 1.5 GB for ImageNet at each epoch and rank.
    """

    def __init__(
        self,
        reader: Reader,
        sample_ids: Ints,
        batch_size: int,
        workers: int,
        image_size: int,
        plan: Planner,
    ) -> None:
        self.reader = reader
        self.indices = sample_ids
        self.batch_size = batch_size
        self.batches_ahead = 3
        # FFCV sets torch's and numba's number of threads to this; the C call has its own threads.
        self.num_workers = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
        self.seed, self.next_epoch = 0, 0
        self.drop_last = self.distributed = self.recompile = False
        self.memory_manager = _MappedFile(reader)
        self.traversal_order = Sequential(self)
        self.first_traversal_order = sample_ids
        pipelines = {
            "image": PipelineSpec("image", _MakeImages(reader.file_name, plan, image_size, workers)),
            "label": PipelineSpec("label", _Labels()),
            "sample_ids": PipelineSpec("label", _SampleIds()),
        }
        fields = {name: position for position, name in enumerate(reader.handlers)}
        self.graph = Graph(pipelines, reader.handlers, fields, reader.metadata, memory_read=None)
        with _compiler_setting:
            # The operations are Python that calls C: there is nothing to compile.
            enabled = Compiler.is_enabled
            Compiler.set_enabled(False)
            try:
                self.generate_code()
            finally:
                Compiler.set_enabled(enabled)

    def __iter__(self) -> Iterator[Batch]:
        """Raises UserError, with the file and the sample, for an image that cannot be decoded."""
        if not len(self.indices):
            return
        batches = super().__iter__()
        try:
            for images, labels, sample_ids in batches:
                if isinstance(images, Exception):
                    raise images
                yield Batch(images, labels, sample_ids)
        finally:
            batches.close()  # or its thread would wait for ever for someone to take a batch


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
) -> BatchLoader:
    """Every image of the file once, over all ranks, in the file's order, without padding.

    A rank yields its contiguous share in batches of `batch_size`, the last one smaller. The pixels
    are those of timm's evaluation transform: the short side to `image_size / crop_fraction`,
    bicubic, centre crop.

    Raises:
        UserError: the file cannot be used.
    """
    reader = open_beton(beton)
    num_samples = int(reader.num_samples)
    start, end = (num_samples * r // world_size for r in (rank, rank + 1))

    def plan(sample_ids: Ints, widths: Ints, heights: Ints) -> Records:
        return eval_plans(widths, heights, image_size=image_size, crop_fraction=crop_fraction)

    return BatchLoader(reader, np.arange(start, end, dtype=np.int64), batch_size, workers, image_size, plan)


class _MappedFile(OSCacheManager):
    """FFCV's memory-mapped file, without the map of every sample to its page."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        table = reader.alloc_table[np.argsort(reader.alloc_table["ptr"])]
        self.ptrs, self.sizes = table["ptr"], table["size"]
        self.context = OSCacheContext(self)


class _Decoder(Operation):
    """An FFCV decoder in plain Python, with memory of its own."""

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
        return replace(previous_state, jit_mode=False), None


class _MakeImages(_Decoder):
    """Images of a batch, or the error that kept them from being made: FFCV's thread has no other
    way to hand over an exception, it would die and leave the consumer waiting."""

    def __init__(self, file_name: str, plan: Planner, image_size: int, workers: int) -> None:
        super().__init__()
        self.file_name = file_name
        self.plan = plan
        self.image_size = image_size
        self.workers = workers

    def generate_code(self) -> Callable[..., Tensor | Exception]:
        def make(sample_ids: Ints, _: None, metadata: Records, storage: Any) -> Tensor | Exception:
            try:
                return self.make_images(sample_ids, metadata[sample_ids], storage)
            except SampleError as error:
                return UserError(
                    f"{self.file_name}: image {sample_ids[error.position]} cannot be decoded "
                    f"({error.reason}): delete the file and convert again"
                )
            except Exception as error:
                return error

        return make

    def make_images(self, sample_ids: Ints, rows: Records, storage: Any) -> Tensor:
        file, pointers, sizes = storage
        sources = np.zeros(len(rows), SOURCE)
        sources["data"] = file.ctypes.data + rows["data_ptr"]
        sources["size_bytes"] = sizes[np.searchsorted(pointers, rows["data_ptr"])]
        sources["width"], sources["height"] = rows["width"], rows["height"]
        sources["raw"] = rows["mode"]
        widths, heights = rows["width"].astype(np.int64), rows["height"].astype(np.int64)
        plans = self.plan(sample_ids, widths, heights)
        shape = (len(rows), self.image_size, self.image_size, 3)
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        make_batch(sources, plans, images.numpy(), self.workers)
        return images.permute(0, 3, 1, 2)


class _Labels(_Decoder):
    def generate_code(self) -> Callable[..., Tensor]:
        def read(sample_ids: Ints, _: None, metadata: npt.NDArray[np.int64], __: Any) -> Tensor:
            return torch.from_numpy(metadata[sample_ids])

        return read


class _SampleIds(_Decoder):
    def generate_code(self) -> Callable[..., Tensor]:
        def read(sample_ids: Ints, _: None, __: Any, ___: Any) -> Tensor:
            return torch.from_numpy(sample_ids.copy())

        return read
