"""At ImageNet's size and with a thousand trainings: work and memory grow with the number, and by little for each.

Work is the number of calls of functions, Python's and C's, which no other process disturbs; memory is what Python and
numpy allocate. `python -m benchmarks.scale` measures time and memory at real size.
"""

import os
import sys
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline import paths
from pipeline.config import ImageNetData, Params, load_params
from pipeline.data import loaders
from pipeline.data.manifest import COLUMNS, verify_beton
from pipeline.experiments import compose
from pipeline.launch import jobs, record, works
from pipeline.launch.fingerprint import Work
from pipeline.launch.record import Job
from pipeline.launch.submission import Run
from pipeline.tasks.classification import images
from pipeline.tasks.classification.description import CLASSIFIER

FEW, MANY, CLASSES = 2_500, 7_500, 20
FEW_RUNS, MANY_RUNS = 20, 80
DATA = ImageNetData(source="folder", root="data/imagenet", splits=["train"], num_classes=CLASSES, storage="original")
BETON = paths.beton("imagenet", "train")
LIMITS: dict[str, tuple[Callable[[], object], float, float]] = {
    "prepare": (lambda: images.prepare(DATA), 20, 60),
    "convert": (lambda: images.convert(DATA, workers=2), 200, 110),
    "verify": (lambda: verify_beton(BETON), 40, 80),
    "train": (lambda: next(iter(loaders.train_loader(BETON, batch_size=64, seed=0, epoch=1, workers=1))), 1, 120),
    "evaluate": (lambda: next(iter(loaders.eval_loader(BETON, batch_size=64, workers=1))), 1, 120),
}
"""Calls and bytes that one more image may add. FFCV's own tables have 62 bytes of each in memory."""


def cost(work: Callable[[], object]) -> tuple[int, int]:
    """Calls of functions in all threads that `work` starts, and the most that was allocated meanwhile, bytes."""
    counted = Counter[str]()

    def count(frame: Any, event: str, argument: Any) -> None:
        counted[event] += 1

    tracemalloc.start()
    threading.setprofile(count)
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return counted["call"] + counted["c_call"], peak


def for_one_more(few: int, many: int, costs: tuple[tuple[int, int], tuple[int, int]]) -> tuple[float, float]:
    """Calls and bytes. A quadratic part shows: it adds `few` + `many` times what a pair costs."""
    small, large = costs
    return (large[0] - small[0]) / (many - few), (large[1] - small[1]) / (many - few)


def write_images(root: Path, number: int) -> None:
    """Most are further names of one file of their class."""
    for label in range(CLASSES):
        folder = root / f"data/imagenet/train/n{label:08}"
        folder.mkdir(parents=True)
        first = folder / f"{folder.name}_0.JPEG"
        Image.new("RGB", (16, 16), (label, 0, 0)).save(first)
        for image in range(1, number // CLASSES):
            os.link(first, folder / f"{folder.name}_{image}.JPEG")


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, float]]:
    """Of each of LIMITS, what one more image adds."""
    found: dict[str, list[tuple[int, int]]] = {name: [] for name in LIMITS}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for number in (CLASSES * 4, FEW, MANY):  # the first one imports
            root = tmp_path_factory.mktemp("images")
            write_images(root, number)
            monkeypatch.chdir(root)
            for name, (work, _, _) in LIMITS.items():
                found[name].append(cost(work))
    return {name: for_one_more(FEW, MANY, (few, many)) for name, (_, few, many) in found.items()}


@pytest.mark.parametrize("name", LIMITS)
def test_one_more_image_adds_little_work_and_memory(name: str, costs: dict[str, tuple[float, float]]) -> None:
    _, most_calls, most_bytes = LIMITS[name]
    added_calls, added_bytes = costs[name]
    assert added_calls < most_calls
    assert added_bytes < most_bytes


@pytest.fixture
def params(in_checkout: Path) -> Params:
    """Many seeds of S12, whose .beton has 10,000 images by its manifest."""
    compose(["scale=paper", "classification.train=[poolformer_s12]", f"seeds=[{','.join(map(str, range(MANY_RUNS)))}]"])
    manifest = paths.manifest(BETON)
    manifest.parent.mkdir(parents=True)
    rows = (f"{index},n0/{index}.JPEG,0,jpg,9,9,700,{'0' * 64}\n" for index in range(10_000))
    manifest.write_text(",".join(COLUMNS) + "\n" + "".join(rows))
    return load_params(paths.PARAMS)


def write_run(params: Params, seed: int) -> None:
    """A run folder as a finished training leaves it, with a history of a thousand lines."""
    run = Run.of(work_of(params, seed))
    run.folder.mkdir(parents=True)
    for name in ("fingerprint", "done"):
        (run.folder / name).write_text(run.fingerprint)
    record.write_job(run.folder, Job("local", "token", "jobs", {}, 0.0, job_id="1"))
    (run.folder / "history.jsonl").write_text('{"step": 1}\n' * 1000)


def work_of(params: Params, seed: int) -> Work:
    work = works.training(params, CLASSIFIER, "poolformer_s12", seed)
    assert work is not None
    return work


def find_all(params: Params, seeds: int) -> None:
    """As the report does."""
    for seed in range(seeds):
        assert works.training_folder(params, CLASSIFIER, "poolformer_s12", seed) is not None


TRAININGS: dict[str, tuple[Callable[[Params, int], object], float]] = {
    "find": (find_all, 550),
    "jobs": (lambda params, seeds: jobs.show_jobs(), 200),
}
"""Calls that one more finished training may add. The manifest's rows alone, read again for each, would be 10,000."""


@pytest.mark.parametrize("name", TRAININGS)
def test_one_more_training_adds_little_work(name: str, params: Params) -> None:
    do, most_calls = TRAININGS[name]
    found = []
    for before, number in ((0, 1), (1, FEW_RUNS), (FEW_RUNS, MANY_RUNS)):  # the first one imports
        for seed in range(before, number):
            write_run(params, seed)
        found.append(cost(lambda number=number: do(params, number)))  # type: ignore[misc]
    calls, _ = for_one_more(FEW_RUNS, MANY_RUNS, (found[1], found[2]))
    print(calls)
    assert calls < most_calls
