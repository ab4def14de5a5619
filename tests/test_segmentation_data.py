"""Segmentation: what is stored, and loaders whose pixels are those of mmseg's pipeline.

The reference below says in plain numpy and cv2 what mmseg's transforms do, and draws the same
numbers in the same order.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch
from ffcv.reader import Reader
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import nn

from pipeline import device
from pipeline.cluster import Profile
from pipeline.data import (
    convert_segmentation_folder,
    segmentation_eval_loader,
    segmentation_train_loader,
)
from pipeline.data.manifest import read_manifest, verify_beton
from pipeline.data.segmentation import SegmentationAugmentation, SegmentationBatch
from pipeline.data.segmentation_pixels import distort, draw_crop
from pipeline.errors import UserError
from pipeline.tasks.segmentation import evaluation

pytestmark = pytest.mark.timeout(120)  # a loader that loses an exception waits for ever

PHOTO = Image.fromarray(load_sample_image("flower.jpg"))  # 640x427
CLASSES = 7
SMALL = SegmentationAugmentation(scale=(256, 64), crop_size=48)
Pixels = npt.NDArray[Any]  # uint8


def labels_for(width: int, height: int, seed: int) -> Image.Image:
    """Blobs of the labels 0 to CLASSES."""
    random = np.random.default_rng(seed)
    blobs = Image.fromarray(random.integers(0, 256, (5, 6), dtype=np.uint8))
    smooth = np.asarray(blobs.resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray((smooth.astype(int) * (CLASSES + 1) // 256).astype(np.uint8))


def write_pair(root: Path, name: str, image: Image.Image, mask: Image.Image, **options: Any) -> None:
    for kind in ("images", "annotations"):
        (root / kind / "training").mkdir(parents=True, exist_ok=True)
    image.save(root / "images" / "training" / name, **options)
    mask.save(root / "annotations" / "training" / f"{Path(name).stem}.png")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight photographs of several sizes and kinds, with masks."""
    root = tmp_path_factory.mktemp("scenes")
    for number in range(5):
        width, height = (90 + 17 * number, 140 - 11 * number)
        crop = PHOTO.crop((60 * number, 20, 60 * number + width, 20 + height))
        write_pair(root, f"photo_{number}.jpg", crop, labels_for(width, height, number), quality=90)
    crop, exif = PHOTO.crop((200, 100, 300, 160)), Image.Exif()
    write_pair(root, "grey.jpg", crop.convert("L"), labels_for(100, 60, 5))
    write_pair(root, "pixels.png", crop, labels_for(100, 60, 6))
    exif[274] = 6  # OpenCV turns it by 90 degrees
    write_pair(root, "turned.jpg", crop, labels_for(60, 100, 7), exif=exif)
    return root


@pytest.fixture(scope="module")
def beton(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("beton") / "training.beton"
    convert_segmentation_folder(scenes, "training", path, workers=2, num_classes=CLASSES)
    return path


def files(scenes: Path) -> Iterator[tuple[Path, Path]]:
    for image in sorted((scenes / "images" / "training").iterdir()):
        yield image, scenes / "annotations" / "training" / f"{image.stem}.png"


def samples(scenes: Path) -> list[tuple[Pixels, Pixels]]:
    """BGR as OpenCV reads the files, and the files' labels."""
    pairs = []
    for image_path, mask_path in files(scenes):
        image = cv2.imread(str(image_path), cv2.IMREAD_COLOR)
        assert image is not None
        pairs.append((image, np.asarray(Image.open(mask_path))))
    return pairs


# --- conversion ----------------------------------------------------------------------------------


def test_images_and_masks_are_stored_as_they_are(scenes: Path, beton: Path) -> None:
    reader, data = Reader(str(beton)), beton.read_bytes()
    assert reader.field_names == ["image", "mask"]
    table = reader.alloc_table.reshape(-1, 2)
    pairs = list(files(scenes))
    assert len(table) == len(pairs) == verify_beton(beton)
    for row, (image, mask), (mode, *_) in zip(table, pairs, reader.metadata["f0"].tolist(), strict=True):
        stored = [data[part["ptr"] : part["ptr"] + part["size"]] for part in row]
        if image.suffix == ".png":
            assert (mode, stored[0]) == (1, Image.open(image).tobytes())
        else:
            assert (mode, stored[0]) == (0, image.read_bytes())
        assert stored[1] == Image.open(mask).tobytes()
    first = next(read_manifest(beton))
    assert (first.path, first.label) == (
        "images/training/grey.jpg",
        "annotations/training/grey.png",
    )


def test_the_file_does_not_depend_on_the_number_of_workers(scenes: Path, beton: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.beton"
    convert_segmentation_folder(scenes, "training", again, workers=1, num_classes=CLASSES)
    assert again.read_bytes() == beton.read_bytes()


GOOD = labels_for(100, 60, 0)
BAD_MASKS = {
    "rgb": (GOOD.convert("RGB"), r"bad\.png is of mode RGB"),
    "16-bit": (Image.fromarray(np.zeros((60, 100), np.uint16)), r"bad\.png is of mode I;16"),
    "another size": (labels_for(99, 60, 0), r"bad\.png is 99x60 px, but its image is 100x60"),
    "a label too high": (GOOD.point(lambda v: v + 1), r"bad\.png has the label 8; 0 .* to 7"),
}


@pytest.mark.parametrize("kind", BAD_MASKS)
def test_a_mask_that_does_not_fit_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    mask, message = BAD_MASKS[kind]
    crop = PHOTO.crop((0, 0, 100, 60))
    write_pair(tmp_path / "scenes", "good.jpg", crop, GOOD)
    write_pair(tmp_path / "scenes", "bad.jpg", crop, mask)
    with pytest.raises(UserError, match=message):
        convert_segmentation_folder(
            tmp_path / "scenes", "training", tmp_path / "out" / "x.beton", workers=2, num_classes=7
        )
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("kept", [0.5, 0.0])
@pytest.mark.parametrize("name", ["images/training/bad.jpg", "annotations/training/bad.png"])
def test_a_file_cut_short_is_refused_by_name(tmp_path: Path, name: str, kept: float) -> None:
    write_pair(tmp_path, "bad.jpg", PHOTO.crop((0, 0, 100, 60)), GOOD)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(UserError, match=name):
        convert_segmentation_folder(tmp_path, "training", tmp_path / "x.beton", workers=1, num_classes=7)


def test_images_and_annotations_have_to_pair(tmp_path: Path) -> None:
    def convert() -> None:
        convert_segmentation_folder(tmp_path, "training", tmp_path / "x.beton", workers=1, num_classes=7)

    with pytest.raises(UserError, match="images/training is not there"):
        convert()
    write_pair(tmp_path, "a.jpg", PHOTO.crop((0, 0, 100, 60)), GOOD)
    GOOD.save(tmp_path / "annotations" / "training" / "b.png")
    with pytest.raises(UserError, match=r"annotations/training/b\.png has no image"):
        convert()
    (tmp_path / "annotations" / "training" / "b.png").unlink()
    PHOTO.save(tmp_path / "images" / "training" / "c.jpg")
    with pytest.raises(UserError, match=r"c\.jpg has no annotation: .*c\.png is missing"):
        convert()


# --- pixels --------------------------------------------------------------------------------------


def reference_convert(pixels: Pixels, alpha: float = 1, beta: float = 0) -> Pixels:
    return np.clip(pixels.astype(np.float32) * alpha + beta, 0, 255).astype(np.uint8)


def reference_distortion(image: Pixels, random: np.random.Generator) -> Pixels:
    if random.integers(2):
        image = reference_convert(image, beta=random.uniform(-32, 32))
    first = random.integers(2)
    if first and random.integers(2):
        image = reference_convert(image, alpha=random.uniform(0.5, 1.5))
    if random.integers(2):
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        hsv[:, :, 1] = reference_convert(hsv[:, :, 1], alpha=random.uniform(0.5, 1.5))
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if random.integers(2):
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        hsv[:, :, 0] = (hsv[:, :, 0].astype(int) + random.integers(-18, 18)) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if not first and random.integers(2):
        image = reference_convert(image, alpha=random.uniform(0.5, 1.5))
    return image


def reference_crop(image: Pixels, labels: Pixels, random: np.random.Generator, size: int) -> tuple[Pixels, Pixels]:
    def draw() -> tuple[int, int]:
        top = int(random.integers(0, max(image.shape[0] - size, 0) + 1))
        return top, int(random.integers(0, max(image.shape[1] - size, 0) + 1))

    top, left = draw()
    for _ in range(10):
        values, counts = np.unique(labels[top : top + size, left : left + size], return_counts=True)
        counts = counts[values != 255]
        if len(counts) > 1 and counts.max() / counts.sum() < 0.75:
            break
        top, left = draw()
    place = (slice(top, top + size), slice(left, left + size))
    return image[place], labels[place]


def reference_sample(
    original: tuple[Pixels, Pixels], random: np.random.Generator, how: SegmentationAugmentation
) -> tuple[Pixels, Pixels]:
    """mmseg's LoadAnnotations, RandomResize, RandomCrop, RandomFlip and PhotoMetricDistortion."""
    image, labels = original[0], original[1].copy()
    labels[labels == 0] = 255
    labels = labels - 1
    labels[labels == 254] = 255
    ratio = random.uniform(0.5, 2.0)
    long, short = int(how.scale[0] * ratio), int(how.scale[1] * ratio)
    height, width = image.shape[:2]
    factor = min(long / max(height, width), short / min(height, width))
    size = (int(width * factor + 0.5), int(height * factor + 0.5))
    image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    labels = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST)
    image, labels = reference_crop(image, labels, random, how.crop_size)
    if random.random() < 0.5:
        image, labels = np.fliplr(image), np.fliplr(labels)
    return reference_distortion(np.ascontiguousarray(image), random), labels


def test_training_pixels_are_mmsegs(scenes: Path, beton: Path) -> None:
    originals, seed, epochs = samples(scenes), 3, 6
    loader = segmentation_train_loader(beton, batch_size=8, seed=seed, iterations=epochs, workers=2, augmentation=SMALL)
    padded = 0
    for epoch, batch in enumerate(loader):
        assert batch.images.dtype == batch.labels.dtype == torch.uint8
        assert batch.images.shape == (8, 3, 48, 48)
        for row, sample_id in enumerate(batch.sample_ids.tolist()):
            random = np.random.Generator(np.random.Philox(key=[seed, 2], counter=[0, 0, sample_id, epoch]))
            image, labels = reference_sample(originals[sample_id], random, SMALL)
            height, width = batch.sizes[row].tolist()
            assert (height, width) == labels.shape
            rgb = batch.images[row].permute(1, 2, 0).numpy()
            assert np.array_equal(rgb[:height, :width], image[..., ::-1])
            assert np.array_equal(batch.labels[row, :height, :width], labels)
            assert not rgb[height:].any()
            assert not rgb[:, width:].any()
            assert (batch.labels[row, height:] == 255).all()
            assert (batch.labels[row, :, width:] == 255).all()
            padded += (height, width) != (48, 48)
    assert 0 < padded < 48


def test_distortion_has_mmsegs_pixels_for_every_colour() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    for seed in range(200):
        ours = distort(colours, np.random.default_rng(seed))
        assert np.array_equal(ours, reference_distortion(colours, np.random.default_rng(seed)))


def test_no_class_fills_three_quarters_where_that_can_be_had() -> None:
    """Right of column 100 there are two classes, left of it one; "other" counts for nothing."""
    mask = np.ones((40, 200), np.uint8)
    mask[:20, 100:] = 2
    mask[:, ::2] = 0
    random, shares, lefts = np.random.default_rng(0), [], []
    for _ in range(300):
        rows, columns = draw_crop(mask, random, 40, 0.75)
        counts = np.bincount(mask[rows, columns].ravel(), minlength=3)[1:]
        shares.append(counts.max() / counts.sum())
        lefts.append(columns.start)
    assert max(shares) < 0.75
    assert min(lefts) < 85  # half of the crop and more lies right of column 100
    assert max(lefts) > 150
    one_class = draw_crop(np.ones((40, 200), np.uint8), random, 40, 0.75)
    assert one_class[0] == slice(0, 40)


def test_augmentation_is_spread_as_the_recipe_says(beton: Path) -> None:
    how = SegmentationAugmentation(scale=(256, 64), crop_size=400, cat_max_ratio=1, hflip=0)
    loader = segmentation_train_loader(beton, batch_size=8, seed=0, iterations=60, workers=2, augmentation=how)
    sides, means = [], []
    for batch in loader:
        sides += (batch.sizes.min(1).values / 64).tolist()
        means.append(batch.images[0, :, : batch.sizes[0, 0], : batch.sizes[0, 1]].float().mean())
    ratios = np.array(sides)
    assert 0.49 <= ratios.min() < 0.52
    assert 1.97 < ratios.max() <= 2.0
    assert np.abs(np.quantile(ratios, [0.25, 0.5, 0.75]) - [0.875, 1.25, 1.625]).max() < 0.1
    assert torch.stack(means).std() > 10


# --- order ---------------------------------------------------------------------------------------


def train(beton: Path, **options: int) -> list[SegmentationBatch]:
    defaults = {"batch_size": 6, "seed": 1, "iterations": 8, "workers": 2}
    return list(segmentation_train_loader(beton, **(defaults | options), augmentation=SMALL))


def same(left: SegmentationBatch, right: SegmentationBatch) -> bool:
    return all(map(torch.equal, left, right))


def test_every_sample_comes_once_an_epoch_and_the_order_changes(beton: Path) -> None:
    ids = torch.cat([batch.sample_ids for batch in train(beton)]).view(6, 8)
    assert (ids.sort(1).values == torch.arange(8)).all()
    assert len({tuple(epoch) for epoch in ids.tolist()}) == 6
    assert not torch.equal(ids[0], train(beton, seed=2)[0].sample_ids)


def test_workers_ranks_and_the_first_iteration_change_no_pixel(beton: Path) -> None:
    whole = train(beton)
    assert len(whole) == 8
    assert all(map(same, whole, train(beton, workers=5)))
    assert all(map(same, whole[5:], train(beton, first_iteration=5)))
    ranks = [train(beton, rank=rank, world_size=3) for rank in range(3)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        joined = SegmentationBatch(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        assert same(batch, joined)
    assert train(beton, first_iteration=8) == []


def test_a_sample_looks_different_in_every_epoch(beton: Path) -> None:
    seen = [
        batch.images[row].numpy().tobytes()
        for batch in train(beton, iterations=16, batch_size=8)
        for row in (batch.sample_ids == 3).nonzero().ravel().tolist()
    ]
    assert len(seen) == len(set(seen)) == 16


def test_the_loader_can_be_iterated_again_and_left_early(beton: Path) -> None:
    loader = segmentation_train_loader(beton, batch_size=4, seed=0, iterations=50, workers=2, augmentation=SMALL)
    first = next(iter(loader))
    assert same(first, next(iter(loader)))
    assert len(loader) == 50


def test_torchs_number_of_threads_stays(beton: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        train(beton, iterations=1, workers=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# --- evaluation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("divisor", [32, None])
def test_evaluation_pixels_are_mmsegs(scenes: Path, beton: Path, divisor: int | None) -> None:
    ratios = (0.5, 1.0, 1.75)
    loader = segmentation_eval_loader(beton, workers=3, scale=(256, 70), size_divisor=divisor, ratios=ratios)
    batches = list(loader)
    assert len(loader) == len(batches) == 8
    for number, (batch, (image, mask)) in enumerate(zip(batches, samples(scenes), strict=True)):
        assert batch.sample_ids.tolist() == [number]
        assert np.array_equal(batch.labels[0], np.where(mask == 0, 255, mask - 1))
        for tensor, ratio in zip(batch.images, ratios, strict=True):
            height, width = image.shape[:2]
            factor = min(int(256 * ratio) / max(height, width), int(70 * ratio) / min(height, width))
            size = (int(width * factor + 0.5), int(height * factor + 0.5))
            expected = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
            if divisor:
                up = tuple(int(np.ceil(side / divisor)) * divisor for side in size)
                expected = cv2.resize(expected, up, interpolation=cv2.INTER_LINEAR)
            assert tensor.shape[:2] == (1, 3)
            assert np.array_equal(tensor[0].permute(1, 2, 0), expected[..., ::-1])


@pytest.mark.parametrize("world_size", [1, 3, 11])
def test_every_image_is_evaluated_once_over_all_ranks(beton: Path, world_size: int) -> None:
    ids = [
        int(batch.sample_ids)
        for rank in range(world_size)
        for batch in segmentation_eval_loader(beton, workers=2, scale=(64, 32), rank=rank, world_size=world_size)
    ]
    assert sorted(ids) == list(range(8))


# --- errors --------------------------------------------------------------------------------------


def test_a_sample_that_cannot_be_decoded_is_an_error_and_no_hang(beton: Path, tmp_path: Path) -> None:
    data = bytearray(beton.read_bytes())
    start = int(Reader(str(beton)).alloc_table[2 * 2]["ptr"])
    data[start : start + 4] = b"oops"
    damaged = tmp_path / "damaged.beton"
    damaged.write_bytes(data)
    for loader in (
        segmentation_eval_loader(damaged, workers=2),
        segmentation_train_loader(damaged, batch_size=2, seed=0, iterations=9, workers=2),
    ):
        with pytest.raises(UserError, match=r"damaged\.beton: sample 2 cannot be decoded"):
            list(loader)


def test_what_cannot_be_loaded_is_refused(beton: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch of 7 cannot be split over 2 ranks"):
        train(beton, batch_size=7, world_size=2)
    cut = tmp_path / "cut.beton"
    cut.write_bytes(beton.read_bytes()[:-1])
    with pytest.raises(UserError, match="is cut short"):
        segmentation_eval_loader(cut, workers=1)


class StandIn(nn.Module):
    """Takes the place of the segmenter: some logits at stride 4, in float64, that follow from the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, CLASSES, 7, stride=4, padding=3, dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.mix.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.mix(images.double())


def bilinear(x: npt.NDArray[np.float64], height: int, width: int) -> npt.NDArray[np.float64]:
    """`(C, h, w)` to `(C, height, width)`, pixel centres at halves, edges repeated."""
    for axis, size in ((1, height), (2, width)):
        centres = np.clip((np.arange(size) + 0.5) * x.shape[axis] / size - 0.5, 0, None)
        low = np.minimum(centres.astype(int), x.shape[axis] - 1)
        high = np.minimum(low + 1, x.shape[axis] - 1)
        share = (centres - low).reshape((-1, 1) if axis == 1 else (1, -1))
        x = np.take(x, low, axis) * (1 - share) + np.take(x, high, axis) * share
    return x


def mmsegs_miou(scenes: Path, model: nn.Module, divisor: int | None, ratios: Sequence[float], flip: bool) -> float:
    """By mmsegmentation's procedure: to the network input's size, to the image's, softmax, mean, one matrix for all."""
    confusion = np.zeros((CLASSES, CLASSES))
    for image, mask in samples(scenes):
        height, width = image.shape[:2]
        total = np.zeros((CLASSES, height, width))
        for ratio in ratios:
            factor = min(int(256 * ratio) / max(height, width), int(70 * ratio) / min(height, width))
            size = [int(side * factor + 0.5) for side in (width, height)]
            pixels = cv2.resize(image, size)
            if divisor:
                size = [-(-side // divisor) * divisor for side in size]
                pixels = cv2.resize(pixels, size)
            x = torch.from_numpy(pixels[..., ::-1].transpose(2, 0, 1).astype(np.float32))
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
            for mirrored in (False, True) if flip else (False,):
                normalised = ((x - mean) / std)[None]
                with torch.no_grad():
                    logits = model(normalised.flip(3) if mirrored else normalised)[0].numpy()
                logits = bilinear(bilinear(logits, size[1], size[0]), height, width)
                share = np.exp(logits - logits.max(0))
                share /= share.sum(0)
                total += share[..., ::-1] if mirrored else share
        predicted, counted = total.argmax(0), mask > 0
        np.add.at(confusion, (mask[counted] - 1, predicted[counted]), 1)
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return float(100 * np.nanmean(confusion.diagonal()[union > 0] / union[union > 0]))


def test_miou_is_that_of_mmsegs_own_procedure_on_odd_sizes(
    scenes: Path, beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = StandIn()
    monkeypatch.setattr(evaluation, "create_segmenter", lambda variant, classes: model)
    monkeypatch.setattr(evaluation, "load_released", lambda model, path: model)
    monkeypatch.setattr(evaluation, "count_macs", lambda model, size: 0)
    ratios = [0.5, 1.0, 1.75]
    settings = {"scale": [256, 70], "size_divisor": 32, "multi_scale_ratios": ratios, "precision": "fp32"}
    arguments = {"variant": "poolformer_s12", "num_classes": CLASSES, "beton": str(beton), "weights": "none"}
    evaluation.evaluate(device.alone(), tmp_path, Profile(kind="local"), settings=settings, **arguments)
    measured = json.loads((tmp_path / "out/metrics.json").read_text())
    for key, divisor, many in (
        ("miou", None, False),
        ("miou_aligned", 32, False),
        ("miou_ms_flip", None, True),
        ("miou_aligned_ms_flip", 32, True),
    ):
        expected = mmsegs_miou(scenes, model, divisor, ratios if many else [1.0], flip=many)
        assert measured[key] == pytest.approx(expected, abs=1e-9), key
    counts = pd.read_parquet(tmp_path / "out/predictions.parquet")
    assert sorted(set(counts["sample_id"])) == list(range(8))
    sums = counts.groupby("class").sum()
    iou = sums["correct"] / (sums["labelled"] + sums["predicted"] - sums["correct"])
    assert 100 * iou.mean() == pytest.approx(measured["miou_aligned"])
