"""Conversion, loading by the paper's recipe, and bare decoding, each with one thread, against timm and stock FFCV.

Each measurement runs in its own process, so that memory is separate too; all processes share one
core and run in turns, so that a machine that slows down slows them alike.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import platform
import re
import resource
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, redirect_stderr
from dataclasses import dataclass
from datetime import date
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import timm.data
import torch
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.decoders import IntDecoder
from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
from ffcv.libffcv import lib as ffcv_library
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage
from ffcv.writer import DatasetWriter
from PIL import Image
from timm.data import auto_augment
from torchvision.datasets import ImageFolder

from pipeline.data.convert import convert_image_folder
from pipeline.data.folders import list_image_folder
from pipeline.data.loaders import train_loader
from pipeline.data.pixels import decode_jpeg
from pipeline.data.stored import plain_jpeg_size
from pipeline.errors import UserError

IMAGE_SIZE_PX = 224
BATCH_SIZE = 64
STOCK_JPEG_QUALITY = 90  # FFCV's default
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
Row = dict[str, str | int | float]


@dataclass(frozen=True)
class Measurement:
    """One bar of the figure, one row of the table."""

    kind: Literal["convert", "load", "decode"]
    name: str
    work: str  # what is done to each image
    run: Callable[[int], int]  # does one pass, of this number, over all images; returns how many they were
    stored: Path  # the folder or the file that is written or read
    reference: str | None = None  # the measurement of the same work that this one is compared with


class Pass(NamedTuple):
    """One pass over the images."""

    images_per_cpu_s: float
    images_per_wall_s: float
    peak_memory_mb: float  # of the process since it began


def measure(folder: Path, scratch: Path, repeats: int) -> list[Row]:
    """Measure everything on the images in `folder`; .beton files are written to `scratch`.

    Rates are medians over `repeats` passes, ratios are medians of the ratios in the same round.

    Raises:
        UserError: an image cannot be read, or FFCV is a wheel that lacks what is measured of it.
    """
    if hasattr(ffcv_library, "built_without_opencv"):
        raise UserError("stock FFCV cannot be measured: it was built without OpenCV, for `make setup WHEELHOUSE=`")
    num_images = len(list_image_folder(folder))
    batch_size = min(BATCH_SIZE, num_images)
    stock, original, compact = (scratch / f"{name}.beton" for name in ("stock", "original", "compact"))
    recipe = f"decode, random crop, resize, flip, {RAND_AUGMENT}, batch"
    by_timm, by_ffcv = "timm's loader", "stock FFCV's writer"
    convert = partial(Measurement, "convert", reference=by_ffcv)
    load, decode = partial(Measurement, "load"), partial(Measurement, "decode")
    fewer = "fast decode, random crop, resize by area, flip, batch; no RandAugment"
    conversions = [
        # The first one refuses by name an image on which FFCV's writer would wait for ever.
        convert(
            "ours, original", "check, hash, store as it is", partial(_convert, "original", folder, original), original
        ),
        convert(
            "ours, compact", "decode, shrink, encode, hash", partial(_convert, "compact", folder, compact), compact
        ),
        convert(by_ffcv, "decode, encode", partial(_convert_by_ffcv, folder, stock), stock),
    ]
    loaders = [
        load(by_timm, recipe, partial(_load_by_timm, folder, batch_size), folder, by_timm),
        load("stock FFCV", fewer, partial(_load_by_ffcv, stock, batch_size), stock),
        load("ours, original", recipe, partial(_load, original, batch_size), original, by_timm),
        load("ours, compact", recipe, partial(_load, compact, batch_size), compact, by_timm),
        decode("decode, Pillow", "decode", partial(_decode, folder, _pillow_decode), folder),
        decode("decode, ours", "decode", partial(_decode, folder, decode_jpeg), folder),
    ]
    return [row for group in (conversions, loaders) for row in _measure_in_turns(group, num_images, repeats)]


def _measure_in_turns(measurements: list[Measurement], num_images: int, repeats: int) -> list[Row]:
    passes: dict[str, list[Pass]] = {measurement.name: [] for measurement in measurements}
    with ExitStack() as stack:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # the imports take ten seconds: once, not for each process
        processes = [stack.enter_context(ProcessPoolExecutor(1, context, _use_one_core)) for _ in measurements]
        libraries_mb = [process.submit(_memory_mb, "VmRSS").result() for process in processes]
        for round_number in range(repeats + 1):
            for process, measurement in zip(processes, measurements, strict=True):
                print(f"round {round_number} of {repeats}: {measurement.kind}, {measurement.name}", flush=True)
                done = process.submit(_timed, measurement.run, round_number).result()
                if round_number:  # the round before the first compiles, and brings the files into memory
                    passes[measurement.name].append(done)
    rows: list[Row] = []
    for measurement, memory_mb in zip(measurements, libraries_mb, strict=True):
        own, reference = passes[measurement.name], passes.get(measurement.reference or "", [])
        ratio = _median(a.images_per_cpu_s / b.images_per_cpu_s for a, b in zip(own, reference, strict=False))
        rows.append(
            {
                "date": date.today().isoformat(),
                "machine": _machine(),
                "cores": os.cpu_count() or 1,
                "images": num_images,
                "repeats": repeats,
                "kind": measurement.kind,
                "measurement": measurement.name,
                "work": measurement.work,
                "images_per_cpu_s": _median(one.images_per_cpu_s for one in own),
                "images_per_wall_s": _median(one.images_per_wall_s for one in own),
                "ratio_to_timm": ratio if measurement.kind != "convert" else np.nan,
                "ratio_to_stock_ffcv": ratio if measurement.kind == "convert" else np.nan,
                "bytes_on_disk": _bytes_on_disk(measurement.stored),
                "libraries_mb": memory_mb,
                "peak_memory_mb": own[-1].peak_memory_mb,
            }
        )
    return rows


# What follows runs in the processes that measure.


def _use_one_core() -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    # As where FFCV's writer is used by itself: its workers are then children of this process, whose time counts.
    multiprocessing.set_start_method("fork", force=True)
    # timm with Pillow 13 raises ValueError where posterize keeps 0 bits; older Pillow made that black.
    operations: dict[str, Any] = auto_augment.NAME_TO_OP
    operations["PosterizeIncreasing"] = partial(_posterize, operations["PosterizeIncreasing"])


def _posterize(posterize: Callable[..., Image.Image], image: Image.Image, bits: int, **options: object) -> Image.Image:
    return posterize(image, bits, **options) if bits else Image.new(image.mode, image.size)


def _timed(run: Callable[[int], int], round_number: int) -> Pass:
    cpu_s, wall_s = _cpu_s(), time.perf_counter()
    images = run(round_number)
    cpu_s, wall_s = _cpu_s() - cpu_s, time.perf_counter() - wall_s
    children_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
    return Pass(images / cpu_s, images / wall_s, max(_memory_mb("VmHWM"), children_mb))


def _cpu_s() -> float:
    """CPU time of all threads of this process, and of its children that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in usage)


def _memory_mb(entry: str) -> float:
    """`VmRSS`, resident now, or `VmHWM`, its peak; getrusage's peak would begin with the parent's."""
    found = re.search(rf"{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1e3 if found else np.nan


def _convert(storage: Literal["original", "compact"], folder: Path, beton: Path, round_number: int) -> int:
    with redirect_stderr(io.StringIO()):  # the progress bar
        convert_image_folder(folder, beton, storage=storage, workers=1)
    return len(list_image_folder(folder))


def _convert_by_ffcv(folder: Path, beton: Path, round_number: int) -> int:
    images = ImageFolder(folder)
    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=STOCK_JPEG_QUALITY), "label": IntField()}
    with redirect_stderr(io.StringIO()):
        DatasetWriter(str(beton), fields, num_workers=1).from_indexed_dataset(images)
    for worker in multiprocessing.active_children():
        worker.join()
    return len(images)


def _load_by_timm(folder: Path, batch_size: int, round_number: int) -> int:
    return sum(len(labels) for _, labels in _timm_loader(folder, batch_size))


@cache
def _timm_loader(folder: Path, batch_size: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """What timm does on the CPU, up to uint8 batches: its prefetcher's normalise and erase are the device's work."""
    return timm.data.create_loader(
        timm.data.ImageDataset(str(folder)),
        (3, IMAGE_SIZE_PX, IMAGE_SIZE_PX),
        batch_size,
        is_training=True,
        auto_augment=RAND_AUGMENT,
        interpolation="random",
        num_workers=0,
        device=torch.device("cpu"),
    ).loader


def _load_by_ffcv(beton: Path, batch_size: int, round_number: int) -> int:
    return sum(len(labels) for _, labels in _ffcv_loader(beton, batch_size))


@cache
def _ffcv_loader(beton: Path, batch_size: int) -> Loader:
    crop = RandomResizedCropRGBImageDecoder((IMAGE_SIZE_PX, IMAGE_SIZE_PX))
    pipelines = {
        "image": [crop, RandomHorizontalFlip(), ToTensor(), ToTorchImage()],
        "label": [IntDecoder(), ToTensor(), Squeeze()],
    }
    return Loader(str(beton), batch_size, num_workers=1, order=OrderOption.RANDOM, pipelines=pipelines)


def _load(beton: Path, batch_size: int, round_number: int) -> int:
    loader = train_loader(beton, batch_size=batch_size, seed=0, epoch=round_number, workers=1, image_size=IMAGE_SIZE_PX)
    return sum(len(batch.labels) for batch in loader)


def _decode(folder: Path, decode: Callable[[bytes], object], round_number: int) -> int:
    files = _jpegs(folder)
    for data in files:
        decode(data)
    return len(files)


def _pillow_decode(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


@cache
def _jpegs(folder: Path) -> list[bytes]:
    files = (path.read_bytes() for path in sorted(folder.glob("*/*")))
    return [data for data in files if plain_jpeg_size(data)]


# What follows is for the table.


def _median(values: Iterable[float]) -> float:
    """Of no values: not a number."""
    ordered = list(values)
    return float(np.median(ordered)) if ordered else np.nan


def _bytes_on_disk(path: Path) -> int:
    """What the file system has allocated: a .beton may begin with a hole."""
    files = path.glob("*/*") if path.is_dir() else [path]
    return sum(file.stat().st_blocks * 512 for file in files)


def _machine() -> str:
    """The processor's model."""
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()
