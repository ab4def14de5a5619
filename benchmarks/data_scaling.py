"""`python -m benchmarks.data_scaling`: images/s of the paper's training recipe over workers, ranks and places.

The places are the page cache, the disk (the file's pages are dropped before each pass), and any folder, as one on a
network file system: its pages on this machine are dropped too, those of the server are not. Each rank is a process and
loads its share of the global batches, as in a training; nothing is trained.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import mmap
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from benchmarks.machine import leave, machine_row
from benchmarks.photos import provide_images

BATCH_PER_RANK = 64
IMAGE_PX = 224


class Case(NamedTuple):
    """One row of the table."""

    place: str
    order: str
    ranks: int
    workers: int


def main(arguments: list[str] | None = None) -> int:
    """Measure, write `data_scaling.csv`, print it; returns the exit code."""
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_scaling", description=__doc__)
    parser.add_argument("--folder", type=Path, help="images in ImageNet's layout (default: scikit-learn's photographs)")
    parser.add_argument("--images", type=int, default=2048, help="how many images (default: %(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=sorted({1, 2, cores}), help="default: %(default)s")
    parser.add_argument("--workers", type=int, nargs="+", default=sorted({1, 2, cores}), help="default: %(default)s")
    parser.add_argument(
        "--place", action="append", default=[], metavar="NAME=FOLDER", help="one more place to read from"
    )
    parser.add_argument("--repeats", type=int, default=3, help="counted passes (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    places = dict(place.partition("=")[::2] for place in options.place)
    if options.images < BATCH_PER_RANK * max(options.ranks):
        parser.error(f"--images must be at least {BATCH_PER_RANK} for each rank")
    table = measure(options.folder, options.images, options.ranks, options.workers, places, options.repeats)
    options.output.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.output / "data_scaling.csv", index=False, float_format="%.4g")
    print(table.drop(columns=list(machine_row())).to_string(index=False, float_format="{:.3g}".format))
    return 0


def measure(
    folder: Path | None,
    images: int,
    ranks: Sequence[int],
    workers: Sequence[int],
    places: dict[str, str],
    repeats: int,
) -> pd.DataFrame:
    """A row for each case; rates are medians over the passes, ratios those of the same round."""
    os.environ["NUMBA_DISABLE_JIT"] = "1"  # as in a job
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from pipeline.data.convert import convert_image_folder

    with tempfile.TemporaryDirectory() as local:
        photos = Path(local, "photos")
        provide_images(folder, photos, images)
        original = Path(local, "photos.beton")
        convert_image_folder(photos, original, workers=len(os.sched_getaffinity(0)))
        files = {"page cache": original, "disk": original}
        for name, place in places.items():
            files[name] = Path(place) / f"data_scaling.{os.getpid()}.beton"
            shutil.copyfile(original, files[name])
        try:
            return _table(files, ranks, workers, repeats)
        finally:
            for name in places:
                files[name].unlink()


def _table(files: dict[str, Path], ranks: Sequence[int], workers: Sequence[int], repeats: int) -> pd.DataFrame:
    cases = [Case(place, "random", *layout) for place, *layout in product(files, ranks, workers)]
    cases += [Case(place, "quasi_random", ranks[0], workers[-1]) for place in files if place != "page cache"]
    passes: dict[Case, list[dict[str, float]]] = {case: [] for case in cases}
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(max(ranks), context) as pool:
        for round_number in range(repeats + 1):
            for case in cases:
                print(f"round {round_number} of {repeats}: {case}", flush=True)
                done = _one_pass(pool, files[case.place], case, round_number)
                if round_number:  # the first one imports, and brings the file into memory
                    passes[case].append(done)
    base = passes[Case("page cache", "random", ranks[0], workers[0])]
    megabytes = {place: file.stat().st_size / 1e6 for place, file in files.items()}
    return pd.DataFrame(
        machine_row()
        | case._asdict()
        | {
            "images_per_s": median(one["images_per_s"] for one in own),
            "ratio_to_first": median(
                one["images_per_s"] / first["images_per_s"] for one, first in zip(own, base, strict=True)
            ),
            "mb_per_s": median(one["images_per_s"] / one["images"] for one in own) * megabytes[case.place],
            "in_memory_before": median(one["in_memory_before"] for one in own),
        }
        for case, own in passes.items()
    )


def _one_pass(pool: ProcessPoolExecutor, file: Path, case: Case, epoch: int) -> dict[str, float]:
    if case.place == "page cache":
        with file.open("rb") as stream:
            while stream.read(2**24):
                pass
    else:
        _drop(file)
    before = resident_share(file)
    jobs = [pool.submit(_load, str(file), case, rank, epoch, time.monotonic() + 0.5) for rank in range(case.ranks)]
    spans = [job.result() for job in jobs]
    seconds = max(end for _, end, _ in spans) - min(start for start, _, _ in spans)
    images = sum(number for _, _, number in spans)
    return {"images": images, "images_per_s": images / seconds, "in_memory_before": before}


def _load(file: str, case: Case, rank: int, epoch: int, begin: float) -> tuple[float, float, int]:
    """One rank's share of an epoch; its start and end (of the machine's monotonic clock), and how many images."""
    import torch

    from pipeline.data.loaders import train_loader

    torch.set_num_threads(1)
    time.sleep(max(0.0, begin - time.monotonic()))
    start, images = time.monotonic(), 0
    loader: Any = train_loader(
        file,
        batch_size=BATCH_PER_RANK * case.ranks,
        seed=0,
        epoch=epoch,
        workers=case.workers,
        image_size=IMAGE_PX,
        order=case.order,  # type: ignore[arg-type]
        rank=rank,
        world_size=case.ranks,
    )
    for batch in loader:
        images += len(batch.images)
    end = time.monotonic()
    del loader, batch
    gc.collect()  # pages that a process maps are not dropped
    return start, end, images


def _drop(file: Path) -> None:
    """Have the kernel forget the file's pages."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident_share(file: Path) -> float:
    """How much of a file is in this machine's page cache, from 0 to 1."""
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * pages)()
        address = ctypes.addressof(ctypes.c_ubyte.from_buffer(mapped))
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), found):
            raise OSError(ctypes.get_errno(), "mincore", str(file))
        return float((np.frombuffer(found, np.uint8) & 1).mean())


if __name__ == "__main__":
    leave(main())
