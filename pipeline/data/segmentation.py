"""Segmentation loaders: mmsegmentation's pipeline for ADE20K, inside FFCV's loader.

FFCV runs ahead in a separate thread and hands each batch to one operation, which spreads the samples over worker
threads (OpenCV releases the GIL). Every random draw is a function of (seed, epoch, sample) through Philox: neither the
number of workers or ranks nor the iteration that a run starts from changes a pixel.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from ffcv.reader import Reader
from torch import Tensor

from pipeline.data.beton import IMAGE_MODES, open_beton
from pipeline.data.ffcv_loader import InOrderLoader, Ints
from pipeline.data.random import SEGMENTER_AUGMENTATION, SEGMENTER_ORDER, generator
from pipeline.data.segmentation_pixels import Pixels, SegmentationAugmentation, augment, resize_into, resize_to_multiple
from pipeline.errors import UserError

__all__ = [
    "SegmentationAugmentation",
    "SegmentationBatch",
    "SegmentationEvalBatch",
    "segmentation_eval_loader",
    "segmentation_train_loader",
]

IGNORED_LABEL = 255

Batch = TypeVar("Batch")


class SegmentationBatch(NamedTuple):
    """Training samples, RGB. Right of and below `sizes`, images hold 0 and labels 255.

    mmseg pads after normalisation; so the device has to set that part to 0 once more.
    """

    images: Tensor  # uint8 (B, 3, crop, crop)
    labels: Tensor  # uint8 (B, crop, crop): 0 to classes - 1; 255 is ignored
    sample_ids: Tensor  # int64 (B,), positions in the .beton
    sizes: Tensor  # int64 (B, 2): height and width


class SegmentationEvalBatch(NamedTuple):
    """One image to be evaluated, RGB, at each ratio; its labels at the size of its file."""

    images: tuple[Tensor, ...]  # uint8 (1, 3, h, w)
    labels: Tensor  # uint8 (1, H, W): 0 to classes - 1; 255 is ignored
    sample_ids: Tensor  # int64 (1,), the position in the .beton


class SegmentationLoader(Generic[Batch]):
    """An iterable over batches; each `iter` starts from the first one again."""

    def __init__(
        self,
        reader: Reader,
        positions: Ints,
        batch_size: int,
        num_batches: int,
        make_batches: Callable[[Ints], list[Batch]],
    ) -> None:
        self.reader = reader
        self.positions = positions
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.make_batches = make_batches

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        """Raises UserError, with the file and the sample, for an image that cannot be decoded."""
        cv2.setNumThreads(1)  # the samples are what is done in parallel
        outputs = {"batches": ("image", lambda positions, *_: self.make_batches(positions))}
        for (batches,) in InOrderLoader(self.reader, self.positions, self.batch_size, outputs):
            yield from batches


def segmentation_train_loader(
    beton: str | Path,
    *,
    batch_size: int,
    seed: int,
    iterations: int,
    first_iteration: int = 0,
    workers: int,
    augmentation: SegmentationAugmentation | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> SegmentationLoader[SegmentationBatch]:
    """Batches for the iterations from `first_iteration` up to and without `iterations`.

    The samples are an endless sequence of epochs, each in its own random order. Iteration k takes `batch_size` of them
    (the global batch) from position k * batch_size on; a rank yields its share of these, one after the other.

    Raises:
        UserError: the .beton cannot be used, or the batch cannot be split over the ranks.
    """
    if batch_size % world_size:
        raise UserError(f"a global batch of {batch_size} cannot be split over {world_size} ranks: choose a multiple")
    samples = _Samples(beton)
    how = augmentation or SegmentationAugmentation()
    share = batch_size // world_size
    starts = np.arange(first_iteration, iterations, dtype=np.int64) * batch_size + rank * share
    pool = ThreadPoolExecutor(workers)

    @lru_cache(maxsize=2)  # a batch may span two epochs
    def epoch_order(epoch: int) -> Ints:
        return generator(SEGMENTER_ORDER, seed, epoch=epoch).permutation(len(samples))

    def crop(epoch: int, sample_id: int) -> tuple[Pixels, Pixels]:
        random = generator(SEGMENTER_AUGMENTATION, seed, epoch=epoch, sample=sample_id)
        return augment(*samples.read(sample_id), random, how)

    def make_batches(positions: Ints) -> list[SegmentationBatch]:
        epochs, places = np.divmod(positions, len(samples))
        ids = [int(epoch_order(e)[p]) for e, p in zip(epochs.tolist(), places, strict=True)]
        images = torch.zeros(len(ids), 3, how.crop_size, how.crop_size, dtype=torch.uint8)
        labels = torch.full_like(images[:, 0], IGNORED_LABEL)
        sizes = torch.empty(len(ids), 2, dtype=torch.int64)
        for row, (image, mask) in enumerate(pool.map(crop, epochs.tolist(), ids)):
            height, width = mask.shape
            images[row, :, :height, :width] = _rgb_planes(image)
            labels[row, :height, :width] = _shifted(mask)
            sizes[row, 0], sizes[row, 1] = height, width
        return [SegmentationBatch(images, labels, torch.tensor(ids), sizes)]

    positions = (starts[:, None] + np.arange(share)).ravel()
    return SegmentationLoader(samples.reader, positions, share, len(starts), make_batches)


def segmentation_eval_loader(
    beton: str | Path,
    *,
    workers: int,
    scale: tuple[int, int] = (2048, 512),
    size_divisor: int | None = 32,
    ratios: Sequence[float] = (1.0,),
    rank: int = 0,
    world_size: int = 1,
    first: int = 0,
) -> SegmentationLoader[SegmentationEvalBatch]:
    """Every image of the .beton exactly once over all ranks, one at a time; `first` of a rank's share are left out.

    An image is resized into `scale` (longest and shortest side, in px) keeping its ratio, then both
    sides up to a multiple of `size_divisor` ("aligned resize") unless that is None; once for each
    of `ratios`, which multiply `scale`.

    Raises:
        UserError: the .beton cannot be used.
    """
    samples = _Samples(beton)
    ids = np.arange(rank, len(samples), world_size, dtype=np.int64)[first:]
    pool = ThreadPoolExecutor(workers)

    def one(sample_id: int) -> SegmentationEvalBatch:
        image, mask = samples.read(sample_id)
        resized = [resize_into(image, scale, ratio, cv2.INTER_LINEAR) for ratio in ratios]
        if size_divisor is not None:
            resized = [resize_to_multiple(pixels, size_divisor) for pixels in resized]
        images = tuple(_rgb_planes(pixels)[None] for pixels in resized)
        return SegmentationEvalBatch(images, _shifted(mask)[None], torch.tensor([sample_id]))

    def make_batches(ids: Ints) -> list[SegmentationEvalBatch]:
        return list(pool.map(one, ids.tolist()))

    # FFCV's batch is one sample for each worker.
    return SegmentationLoader(samples.reader, ids, workers, len(ids), make_batches)


class _Samples:
    """The decoded samples of a .beton with the fields `image` and `mask`."""

    def __init__(self, beton: str | Path) -> None:
        self.reader = open_beton(beton, fields=("image", "mask"))
        self.stored = np.memmap(beton, np.uint8, "r").view(np.ndarray)
        order = np.argsort(self.reader.alloc_table["ptr"])
        self.pointers = self.reader.alloc_table["ptr"][order]
        self.sizes = self.reader.alloc_table["size"][order]

    def __len__(self) -> int:
        return int(self.reader.num_samples)

    def read(self, sample_id: int) -> tuple[Pixels, Pixels]:
        """The BGR image `(H, W, 3)` and the file's labels `(H, W)`, uint8."""
        row = self.reader.metadata[sample_id].item()
        (mode, width, height, image_pointer), (mask_pointer, mask_bytes) = row
        image_bytes = int(self.sizes[np.searchsorted(self.pointers, image_pointer)])
        data = self.stored[image_pointer : image_pointer + image_bytes]
        mask = self.stored[mask_pointer : mask_pointer + mask_bytes]
        image: Pixels | None
        if IMAGE_MODES[mode] == "raw":
            image = np.ascontiguousarray(data.reshape(height, width, 3)[..., ::-1])
        else:
            image = cv2.imdecode(data, cv2.IMREAD_COLOR)
        if image is None or mask.size != image.size // 3:
            raise UserError(
                f"{self.reader.file_name}: sample {sample_id} cannot be decoded: delete the file and convert again"
            )
        return image, mask.reshape(image.shape[:2])


def _rgb_planes(bgr: Pixels) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(bgr[..., ::-1].transpose(2, 0, 1)))


def _shifted(mask: Pixels) -> Tensor:
    """The file's labels as the protocol counts them: 0 ("other") is 255, k is k - 1."""
    return torch.from_numpy(mask - np.uint8(1))
