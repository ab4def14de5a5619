"""`benchmarks.scale`'s images: as many as ImageNet has, tiny, listed, converted, verified and loaded.

A name is a hard link to one of 4,096 different JPEGs of some 700 bytes: ImageNet's layout, names and number of files
without its 150 GB. So what is measured is the work for each file, not for each byte.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import leave
from benchmarks.measured_alone import Measured, call, command, measured, report

IMAGENET_TRAIN = 1_281_167
CLASSES, CONTENTS = 1000, 4096
SIDE_PX, BATCH = 24, 64
NAMES = {
    "list": "prepare_imagenet: list and check",
    "convert": "convert_imagenet",
    "verify": "doctor --verify: hash every image",
    "identify": "identity of a training, before its job starts",
    "train": "first batch of a training's epoch",
    "quasi_random": "first batch of an epoch, order: quasi_random",
    "eval": "first batch of an evaluation",
}


def write_tree(root: Path, images: int) -> float:
    """`images` files below `root`/train/<class>; returns the seconds that it took.

    No file has more than 400 names: ext4 allows 65,000.
    """
    started = time.monotonic()
    contents = root / "contents"
    contents.mkdir(parents=True)
    random = np.random.default_rng(0)
    originals = [contents / f"{number}.jpg" for number in range(min(CONTENTS, images))]
    for original in originals:
        original.write_bytes(_jpeg(random))
    classes = [root / "train" / f"n{label:08}" for label in range(CLASSES)]
    for folder in classes:
        folder.mkdir(parents=True)
    for number in range(images):
        folder = classes[number * CLASSES // images]
        os.link(originals[number % len(originals)], f"{folder}/{folder.name}_{number}.JPEG")
    return time.monotonic() - started


def rows(checkout: Path, environment: dict[str, str], images: int) -> Iterator[dict[str, Any]]:
    """What each piece of work takes on so many images, in a checkout whose data/imagenet is written here."""
    root = checkout / "data/imagenet"
    seconds = write_tree(root, images)
    print(f"{images:,} names written in {seconds:.0f} s", flush=True)
    try:
        for key, name in NAMES.items():
            found = call("benchmarks.scale_images", key, folder=checkout, environment=environment)
            for place, one in enumerate(found):
                yield {"what": name if place == 0 else f"{name}, second", "count": images, **one}
        for word, says, ends in (("plan", "Together", 0), ("doctor", "needed here", 1)):  # there is no ADE20K
            words = [sys.executable, "-m", "pipeline", word]
            took = command(words, checkout, environment, says=says, ends=ends)
            yield {"what": f"{word} (whole process)", "count": images, **took}
    finally:
        for name in ("data/imagenet", "data/listings", "data/beton"):
            shutil.rmtree(checkout / name, ignore_errors=True)


def _jpeg(random: np.random.Generator) -> bytes:
    from PIL import Image

    encoded = io.BytesIO()
    pixels = random.integers(0, 256, (3, 3, 3), np.uint8)
    Image.fromarray(pixels).resize((SIDE_PX, SIDE_PX)).save(encoded, "JPEG", quality=75)
    return encoded.getvalue()


def _measure(key: str) -> list[Measured]:
    """In the checkout, with everything imported before the clock starts."""
    from pipeline import paths
    from pipeline.config import ImageNetData, load_params
    from pipeline.data import loaders, manifest
    from pipeline.launch.submission import Run
    from pipeline.launch.works import training
    from pipeline.tasks.classification import images
    from pipeline.tasks.classification.description import CLASSIFIER

    data = ImageNetData(
        source="folder", root="data/imagenet", splits=["train"], num_classes=CLASSES, storage="original"
    )
    cores, beton = len(os.sched_getaffinity(0)), paths.beton("imagenet", "train")
    found: list[Measured] = []
    match key:
        case "list":
            with measured(found):
                images.prepare(data)
        case "convert":
            with measured(found):
                images.convert(data, cores)
        case "verify":
            with measured(found):
                manifest.verify_beton(beton)
        case "identify":
            params = load_params(paths.PARAMS)
            for seed in range(2):
                with measured(found):
                    work = training(params, CLASSIFIER, "poolformer_s12", seed)
                    assert work is not None
                    Run.of(work)
        case "train" | "quasi_random":
            order: Any = "random" if key == "train" else key
            for epoch in range(2):
                with measured(found):
                    loader = loaders.train_loader(
                        beton, batch_size=BATCH, seed=0, epoch=epoch, workers=cores, order=order
                    )
                    next(iter(loader))
        case "eval":
            with measured(found):
                next(iter(loaders.eval_loader(beton, batch_size=BATCH, workers=cores)))
    return found


if __name__ == "__main__":
    os.environ["NUMBA_DISABLE_JIT"] = "1"  # as in a job
    report(_measure(sys.argv[1]))
    leave(0)
