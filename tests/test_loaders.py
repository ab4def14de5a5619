"""The classification loaders: which samples, which pixels, in which order, and what goes wrong loudly."""

from __future__ import annotations

import threading
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.pipeline import Compiler
from layout_runs import CLASSIFICATION
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data.auto_augment import NAME_TO_OP

from pipeline import device
from pipeline.data.beton import open_beton
from pipeline.data.convert import convert_image_folder
from pipeline.data.draws import (
    PAPER_AUGMENTATION,
    choose_operation,
    quasi_random_order,
    train_plans,
)
from pipeline.data.loaders import Batch, BatchLoader, TrainAugmentation, epoch_order, eval_loader, train_loader
from pipeline.data.random import CLASSIFIER_AUGMENTATION, uniforms
from pipeline.errors import UserError
from pipeline.tasks.classification.training import ClassificationTask

IMAGE_SIZE = 48
NUM_IMAGES = 43


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs cut to different sizes, as JPEG, greyscale JPEG and PNG, in three classes."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        width, height = (int(side) for side in rng.integers(20, 130, 2))
        left, top = int(rng.integers(0, 640 - width)), int(rng.integers(0, 427 - height))
        photograph = Image.fromarray(load_sample_images().images[number % 2])
        image = photograph.crop((left, top, left + width, top + height))
        path = folder / f"class{number % 3}" / f"{number:03}.{'png' if number % 7 == 0 else 'jpg'}"
        path.parent.mkdir(exist_ok=True)
        image.convert("L" if number % 11 == 0 else "RGB").save(path)
    return folder


@pytest.fixture(scope="module")
def beton(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("beton") / "photographs.beton"
    convert_image_folder(folder, path, storage="original", workers=1)
    return path


@pytest.fixture(scope="module")
def originals(folder: Path) -> list[Image.Image]:
    """The images in the .beton's order, as Pillow decodes them."""
    return [Image.open(path).convert("RGB") for path in sorted(folder.rglob("*.*"))]


def train(beton: Path, **options: Any) -> BatchLoader:
    defaults: dict[str, Any] = {"batch_size": 8, "seed": 5, "epoch": 3, "workers": 1, "image_size": IMAGE_SIZE}
    return train_loader(beton, **(defaults | options))


def ids_of(batches: list[Batch]) -> list[int]:
    return [i for batch in batches for i in batch.sample_ids.tolist()]


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b)


def with_pillow_and_timm(image: Image.Image, plan: np.void, words: np.ndarray) -> np.ndarray:
    """A sample of the training recipe made from the same draws by Pillow and timm's functions."""
    left, top, width, height = plan["box"].tolist()
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    image = image.crop((left, top, left + width, top + height))
    image = image.resize((IMAGE_SIZE, IMAGE_SIZE), filters["bicubic" if plan["cubic"] else "bilinear"])
    if plan["flip"]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for layer in words.reshape(2, 6):
        if layer[1] > 0.5:
            continue
        name, value, interpolation = choose_operation(PAPER_AUGMENTATION, layer)
        if name == "PosterizeIncreasing" and value == 0:
            image = Image.new("RGB", image.size)
            continue
        arguments = () if name in ("AutoContrast", "Equalize", "Invert") else (value,)
        how = {"fillcolor": (124, 116, 104), "resample": filters[interpolation]}
        operation: Any = NAME_TO_OP[name]
        image = operation(image, *arguments, **how)
    return np.array(image)


def test_training_images_are_those_of_pillow_and_timm(beton: Path, originals: list[Image.Image]) -> None:
    compared = 0
    for epoch in range(4):
        batches = list(train(beton, epoch=epoch))
        ids = np.array(ids_of(batches))
        sizes = np.array([originals[i].size for i in ids])
        plans = train_plans(
            PAPER_AUGMENTATION,
            seed=5,
            epoch=epoch,
            sample_ids=ids,
            widths=sizes[:, 0],
            heights=sizes[:, 1],
            image_size=IMAGE_SIZE,
        )
        words = uniforms(CLASSIFIER_AUGMENTATION, 5, blocks=9, epoch=epoch, sample=ids)[:, 24:]
        images = torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1).numpy()
        for image, sample_id, plan, row in zip(images, ids, plans, words, strict=True):
            np.testing.assert_array_equal(image, with_pillow_and_timm(originals[sample_id], plan, row))
            compared += 1
    assert compared == 4 * 40


def test_a_batch_has_the_promised_types_and_order(beton: Path) -> None:
    batches = list(train(beton))
    assert len(batches) == len(train(beton)) == NUM_IMAGES // 8
    assert ids_of(batches) == epoch_order(NUM_IMAGES, 5, 3)[: len(batches) * 8].tolist()
    labels = open_beton(beton).metadata["f1"]
    for batch in batches:
        assert batch.images.shape == (8, 3, IMAGE_SIZE, IMAGE_SIZE)
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.labels.dtype == batch.sample_ids.dtype == torch.int64
        assert batch.labels.tolist() == labels[batch.sample_ids.numpy()].tolist()


def test_batches_are_not_overwritten_by_later_ones(beton: Path) -> None:
    kept = list(train(beton, batch_size=2))
    assert len(kept) > 10  # more than FFCV has buffers
    assert_same(kept, [Batch(*(t.clone() for t in batch)) for batch in train(beton, batch_size=2)])


def test_workers_change_nothing(beton: Path) -> None:
    assert_same(list(train(beton, workers=1)), list(train(beton, workers=3)))


@pytest.mark.parametrize("order", ["random", "quasi_random"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_a_global_batch(beton: Path, world_size: int, order: str) -> None:
    alone = list(train(beton, order=order))
    ranks = [list(train(beton, order=order, rank=r, world_size=world_size)) for r in range(world_size)]
    joined = [Batch(*map(torch.cat, zip(*parts, strict=True))) for parts in zip(*ranks, strict=True)]
    assert_same(alone, joined)


def test_an_epoch_is_the_same_wherever_it_is_started(beton: Path) -> None:
    whole = list(train(beton, epoch=7))
    assert_same(whole, list(train(beton, epoch=7)))
    assert_same(whole[3:], list(train(beton, epoch=7, first_batch=3)))
    assert list(train(beton, epoch=7, first_batch=len(whole))) == []
    for other in ({"epoch": 8}, {"seed": 6}):
        assert ids_of(whole) != ids_of(list(train(beton, **{"epoch": 7} | other)))


def test_iterating_twice_gives_the_same_epoch(beton: Path) -> None:
    loader = train(beton)
    assert_same(list(loader), list(loader))


def test_epoch_orders_are_permutations_that_differ() -> None:
    orders = [epoch_order(1000, seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert not any((one == other).mean() > 0.1 for one, other in combinations(orders, 2))


def test_quasi_random_order_stays_within_few_pages_at_a_time() -> None:
    pages = np.repeat(np.arange(3, 1003), 10)
    order = quasi_random_order(pages, seed=0, epoch=0)
    assert sorted(order) == list(range(10_000))
    assert len(set(pages[order[:1280]])) == 128
    assert not np.array_equal(order, quasi_random_order(pages, seed=0, epoch=1))


def test_a_recipe_chooses_the_order_of_its_epochs(beton: Path) -> None:
    changes = {"global_batch_size": 8, "max_steps": 10, "image_size": IMAGE_SIZE}
    for order in ("random", "quasi_random"):
        recipe = CLASSIFICATION.model_copy(update=changes | {"order": order})
        task = ClassificationTask("poolformer_s12", recipe, 3, beton, 5, device.alone())
        seen = [step.sample_ids.tolist() for step in task.steps(0)]
        epochs = [train(beton, epoch=epoch, order=order) for epoch in (0, 1)]
        assert seen == [batch.sample_ids.tolist() for epoch in epochs for batch in epoch]


@pytest.mark.parametrize(("image_size", "crop_fraction"), [(IMAGE_SIZE, 0.9), (32, 1.0)])
def test_evaluation_images_are_timms(
    beton: Path, originals: list[Image.Image], image_size: int, crop_fraction: float
) -> None:
    transform = timm.data.create_transform(
        image_size, is_training=False, interpolation="bicubic", crop_pct=crop_fraction, use_prefetcher=True
    )
    loader = eval_loader(beton, batch_size=10, workers=2, image_size=image_size, crop_fraction=crop_fraction)
    for batch in loader:
        for image, sample_id in zip(batch.images, batch.sample_ids, strict=True):
            assert torch.equal(image, transform(originals[sample_id]))


@pytest.mark.parametrize("world_size", [1, 2, 4, 50])
def test_evaluation_visits_every_image_once(beton: Path, world_size: int) -> None:
    ranks = [
        list(eval_loader(beton, batch_size=6, workers=1, image_size=8, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert [i for batches in ranks for i in ids_of(batches)] == list(range(NUM_IMAGES))
    assert max(len(batch.labels) for batches in ranks for batch in batches) <= 6


def test_batches_that_cannot_be_made_are_refused(beton: Path) -> None:
    with pytest.raises(UserError, match="cannot be split over 3 ranks"):
        train(beton, world_size=3)
    with pytest.raises(UserError, match=f"holds {NUM_IMAGES} images, less than one batch of 44"):
        train(beton, batch_size=44)


@pytest.mark.timeout(60)
def test_a_damaged_sample_reaches_the_consumer_by_name(beton: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.beton"
    content = bytearray(beton.read_bytes())
    rows = open_beton(beton).metadata["f0"]
    sample_id = int(np.flatnonzero(rows["mode"] == 0)[5])
    start = int(rows["data_ptr"][sample_id])
    content[start : start + 20] = bytes(20)
    damaged.write_bytes(content)
    before = threading.active_count()
    with pytest.raises(UserError, match=rf"damaged\.beton: image {sample_id} cannot be decoded"):
        list(eval_loader(damaged, batch_size=4, workers=2, image_size=32))
    wait_for_threads(before)


@pytest.mark.timeout(60)
def test_a_bug_in_the_operation_reaches_the_consumer(beton: Path) -> None:
    loader = train(beton)
    loader.graph.nodes[0].decoder.read = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        list(loader)


def test_an_error_of_ffcvs_own_thread_reaches_the_consumer(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a CUDA stream: outside our operation, where FFCV's thread would end and the consumer wait for ever."""
    real = EpochIterator.run_pipeline

    def broken(self: EpochIterator, number: int, *rest: Any) -> Any:
        if number == 2:
            raise RuntimeError("CUDA error: uncorrectable ECC error")
        return real(self, number, *rest)

    monkeypatch.setattr(EpochIterator, "run_pipeline", broken)
    batches = iter(train_loader(beton, batch_size=4, seed=0, epoch=0, workers=1, image_size=IMAGE_SIZE))
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(RuntimeError, match="ECC"):
        next(batches)


def test_an_abandoned_iterator_leaves_no_thread(beton: Path) -> None:
    """Not for a moment: at the end of the process it would be ended inside C++, which aborts the process."""
    batches = iter(train_loader(beton, batch_size=1, seed=0, epoch=0, workers=1))
    next(batches)
    running = [thread for thread in threading.enumerate() if isinstance(thread, EpochIterator)]
    assert len(running) == 1
    del batches
    assert not running[0].is_alive()


def test_others_keep_their_threads_and_their_compiler(beton: Path) -> None:
    before = torch.get_num_threads()
    list(train(beton, workers=3))
    assert torch.get_num_threads() == before
    assert Compiler.is_enabled


def test_the_recipe_can_be_made_weaker(beton: Path) -> None:
    plain = TrainAugmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0, rand_augment=None)
    augmented, weaker = list(train(beton)), list(train(beton, augmentation=plain))
    assert ids_of(augmented) == ids_of(weaker)
    assert not torch.equal(augmented[0].images, weaker[0].images)


def wait_for_threads(count: int) -> None:
    deadline = time.monotonic() + 20
    while threading.active_count() > count:
        assert time.monotonic() < deadline, "a thread of the loader is still there"
        time.sleep(0.05)
