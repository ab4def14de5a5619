"""The pixels of pipeline.data.pixels against Pillow's, torchvision's and timm's."""

from __future__ import annotations

import io
import random
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import pytest
import timm.data
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP
from timm.data.transforms import RandomResizedCropAndInterpolation

from pipeline.data import pixels
from pipeline.data.draws import (
    LAYERS,
    PAPER_AUGMENTATION,
    TrainAugmentation,
    choose_operation,
    eval_plans,
    operation_value,
    train_plans,
)
from pipeline.data.random import CLASSIFIER_AUGMENTATION, uniforms
from pipeline.errors import UserError

FILTERS: dict[pixels.Interpolation, Image.Resampling] = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
IMAGENET_MEAN_COLOUR = (124, 116, 104)
LEVELS = tuple(np.arange(0, 10.5, 0.5) / 10)
random_images = arrays(np.uint8, st.tuples(st.integers(1, 24), st.integers(1, 24), st.just(3)))


@lru_cache
def photographs() -> tuple[np.ndarray, ...]:
    return tuple(np.array(image) for image in load_sample_images().images)


def jpeg(image: np.ndarray, **options: Any) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image).save(content, "JPEG", **options)
    return content.getvalue()


def pillow_pixels(content: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(content)).convert("RGB"))


def pillow_op(image: np.ndarray, name: str, value: float, interpolation: pixels.Interpolation) -> np.ndarray:
    """timm's function with Pillow, and black where Pillow 13 refuses to keep 0 bits."""
    if name == "PosterizeIncreasing" and value == 0:
        return np.zeros_like(image)
    arguments = () if LEVEL_TO_ARG[name] is None else (value,)
    how = {"fillcolor": IMAGENET_MEAN_COLOUR, "resample": FILTERS[interpolation]}
    operation: Any = NAME_TO_OP[name]
    return np.array(operation(Image.fromarray(image), *arguments, **how))


def random_box(rng: np.random.Generator, width: int, height: int) -> pixels.Box:
    w, h = int(rng.integers(1, width + 1)), int(rng.integers(1, height + 1))
    return int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h


# OpenCV's names of the chroma subsamplings, more than Pillow writes; and greyscale.
KINDS = {"4:4:4": 0x111111, "4:2:2": 0x211111, "4:2:0": 0x221111, "4:4:0": 0x121111, "4:1:1": 0x411111, "grey": None}


@pytest.mark.parametrize("progressive", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_a_box_gives_pillows_pixels(kind: str, progressive: int) -> None:
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate([(640, 427), (317, 211), (96, 16), (17, 33), (3, 5), (1, 1)]):
        image = photographs()[number % 2][:height, :width]
        quality, restart = int(rng.integers(1, 101)), 5 * (number == 1)
        options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_PROGRESSIVE, progressive]
        options += [cv2.IMWRITE_JPEG_OPTIMIZE, number % 2, cv2.IMWRITE_JPEG_RST_INTERVAL, restart]
        sampling = KINDS[kind]
        if sampling is None:
            image = image[:, :, 0]
        else:
            options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling]
        content = cv2.imencode(".jpg", image, options)[1].tobytes()
        expected = pillow_pixels(content)
        np.testing.assert_array_equal(pixels.decode_jpeg(content), expected)
        for _ in range(8):
            left, top, w, h = box = random_box(rng, width, height)
            np.testing.assert_array_equal(
                pixels.decode_jpeg(content, box), expected[top : top + h, left : left + w], str(box)
            )


@settings(max_examples=60, deadline=None)
@given(image=random_images, quality=st.integers(1, 100), restart=st.integers(0, 2))
def test_decoding_noise_gives_pillows_pixels(image: np.ndarray, quality: int, restart: int) -> None:
    content = jpeg(image, quality=quality, restart_marker_blocks=restart)
    np.testing.assert_array_equal(pixels.decode_jpeg(content), pillow_pixels(content))


def test_a_damaged_scan_is_repaired_as_pillow_does_it() -> None:
    rng = np.random.default_rng(0)
    content = jpeg(photographs()[0][:120, :160], quality=90)
    scan = content.index(b"\xff\xda") + 14
    compared = 0
    for _ in range(150):
        damaged = bytearray(content)
        for place in rng.integers(scan, len(content) - 2, size=2):
            damaged[place] = int(rng.integers(0, 255))  # no 0xff, which might cut the scan short
        try:
            expected = pillow_pixels(bytes(damaged))
        except OSError:
            continue
        np.testing.assert_array_equal(pixels.decode_jpeg(bytes(damaged)), expected)
        compared += 1
    assert compared > 50


def test_a_truncated_jpeg_is_refused() -> None:
    content = jpeg(photographs()[0], quality=90)
    with pytest.raises(pixels.SampleError, match="Premature end"):
        pixels.decode_jpeg(content[: len(content) // 2])


@pytest.mark.parametrize("interpolation", FILTERS)
def test_crop_and_resize_are_pillows(interpolation: pixels.Interpolation) -> None:
    rng = np.random.default_rng(1)
    photograph = photographs()[0]
    shapes = [(640, 427), (1, 1), (640, 1), (1, 427), (224, 224), (224, 300), (300, 224), (40, 400)]
    boxes = [random_box(rng, 640, 427) for _ in range(40)]
    for left, top, w, h in boxes + [(0, 0, *shape) for shape in shapes]:
        size, flip = int(rng.choice([224, 96, 31, 1])), bool(rng.integers(2))
        cropped = Image.fromarray(photograph).crop((left, top, left + w, top + h))
        expected = np.array(cropped.resize((size, size), FILTERS[interpolation]))
        got = pixels.resize_crop(photograph, (left, top, w, h), size, interpolation, flip=flip)
        np.testing.assert_array_equal(got, expected[:, ::-1] if flip else expected, f"{w}x{h} to {size}")


@settings(max_examples=150, deadline=None)
@given(image=random_images, size=st.integers(1, 40), interpolation=st.sampled_from(sorted(FILTERS)))
def test_resizing_noise_is_pillows(image: np.ndarray, size: int, interpolation: pixels.Interpolation) -> None:
    height, width = image.shape[:2]
    expected = Image.fromarray(image).resize((size, size), FILTERS[interpolation])
    got = pixels.resize_crop(image, (0, 0, width, height), size, interpolation)
    np.testing.assert_array_equal(got, np.array(expected))


@pytest.mark.parametrize(("image_size", "crop_fraction"), [(224, 0.9), (224, 0.95), (224, 1.0), (32, 1.0), (33, 0.875)])
def test_evaluation_is_timms(image_size: int, crop_fraction: float) -> None:
    transform = timm.data.create_transform(
        image_size, is_training=False, interpolation="bicubic", crop_pct=crop_fraction, use_prefetcher=True
    )
    shapes = [(640, 427), (500, 375), (375, 427), (427, 427), (33, 427), (640, 41), (32, 32), (8, 20), (1, 3)]
    for width, height in shapes:
        content = np.ascontiguousarray(photographs()[1][:height, :width])
        source, out = np.zeros(1, pixels.SOURCE), np.empty((1, image_size, image_size, 3), np.uint8)
        source[0] = (content.ctypes.data, content.nbytes, width, height, 1, 0)
        plan = eval_plans(np.array([width]), np.array([height]), image_size=image_size, crop_fraction=crop_fraction)
        pixels.make_batch(source, plan, out, workers=1)
        expected = transform(Image.fromarray(content)).numpy().transpose(1, 2, 0)
        np.testing.assert_array_equal(out[0], expected, f"{width}x{height}")


def test_an_image_smaller_than_the_crop_is_padded_as_torchvision_does_it() -> None:
    transform = timm.data.create_transform(
        32, is_training=False, interpolation="bicubic", crop_pct=1.2, use_prefetcher=True
    )
    content = np.ascontiguousarray(photographs()[1][:50, :61])
    source, out = np.zeros(1, pixels.SOURCE), np.empty((1, 32, 32, 3), np.uint8)
    source[0] = (content.ctypes.data, content.nbytes, 61, 50, 1, 0)
    plan = eval_plans(np.array([61]), np.array([50]), image_size=32, crop_fraction=1.2)
    pixels.make_batch(source, plan, out, workers=1)
    np.testing.assert_array_equal(out[0], transform(Image.fromarray(content)).numpy().transpose(1, 2, 0))


@pytest.mark.parametrize("name", pixels.OPERATIONS)
def test_operations_are_timms_at_every_magnitude_and_sign(name: str) -> None:
    resized = Image.fromarray(photographs()[0]).resize((224, 224), Image.Resampling.BICUBIC)
    for image in (np.array(resized), photographs()[1][100:133, 50:91]):
        for level in LEVELS:
            for negative in (False, True):
                value = operation_value(name, level, negative=negative)
                for interpolation in FILTERS:
                    np.testing.assert_array_equal(
                        pixels.apply_op(image, name, value, interpolation),
                        pillow_op(image, name, value, interpolation),
                        f"{value} {interpolation}",
                    )


@settings(max_examples=300, deadline=None)
@given(
    image=random_images,
    name=st.sampled_from(sorted(pixels.OPERATIONS)),
    level=st.floats(0, 1),
    negative=st.booleans(),
    interpolation=st.sampled_from(sorted(FILTERS)),
)
def test_operations_on_noise_are_timms(
    image: np.ndarray, name: str, level: float, negative: bool, interpolation: pixels.Interpolation
) -> None:
    value = operation_value(name, level, negative=negative)
    np.testing.assert_array_equal(
        pixels.apply_op(image, name, value, interpolation), pillow_op(image, name, value, interpolation)
    )


def test_flat_and_two_colour_images_keep_their_histogram_rules() -> None:
    flat = np.full((20, 30, 3), 77, np.uint8)
    striped = flat.copy()
    striped[:, ::2] = 3
    for image in (flat, striped):
        for name in ("AutoContrast", "Equalize"):
            np.testing.assert_array_equal(pixels.apply_op(image, name, 0.0), pillow_op(image, name, 0.0, "bilinear"))


@pytest.mark.parametrize("name", pixels.OPERATIONS)
def test_arguments_are_timms_at_every_magnitude(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for negative in (False, True):
        monkeypatch.setattr("timm.data.auto_augment.random.random", lambda n=negative: 0.75 if n else 0.25)
        for magnitude in np.random.default_rng(0).uniform(0, 10, 200):
            level_to_arg = LEVEL_TO_ARG[name]
            expected = (0.0,) if level_to_arg is None else level_to_arg(magnitude, {})
            assert (operation_value(name, magnitude / 10, negative=negative),) == expected


def test_the_operations_are_those_of_timm_in_its_order() -> None:
    timms = timm.data.auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", {})
    assert [op.name for op in timms.ops] == list(pixels.OPERATIONS)
    assert timms.num_layers == LAYERS
    assert {(op.prob, op.magnitude, op.magnitude_std, op.magnitude_max) for op in timms.ops} == {(0.5, 9, 0.5, None)}


def test_philox_gives_numpys_numbers() -> None:
    rng = np.random.default_rng(0)
    top = 2**64 - 1
    counters = [rng.integers(0, top, 4, np.uint64, endpoint=True) for _ in range(20)]
    counters += [np.array(row, np.uint64) for row in ([top] * 4, [top, top, 0, 5], [top - 1, 0, 0, 0])]
    key = (12345, top)
    words = pixels.philox(key, np.array(counters), blocks=3)
    for row, counter in zip(words, counters, strict=True):
        generator = np.random.Philox(key=np.array(key, np.uint64), counter=counter)
        np.testing.assert_array_equal(row, generator.random_raw(12))


def plans_of(
    width: int, height: int, count: int = 20_000, augmentation: TrainAugmentation = PAPER_AUGMENTATION
) -> np.ndarray:
    sides = np.full(count, width), np.full(count, height)
    ids = np.arange(count)
    return train_plans(augmentation, seed=0, epoch=0, sample_ids=ids, widths=sides[0], heights=sides[1], image_size=224)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (200, 460), (32, 32)])
def test_crops_are_distributed_as_timms(width: int, height: int) -> None:
    random.seed(0)
    image = Image.new("RGB", (width, height))
    timms = [RandomResizedCropAndInterpolation.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(20_000)]
    theirs = np.array(timms)[:, [1, 0, 3, 2]]  # left, top, width, height
    ours = plans_of(width, height)["box"]
    for side in range(4):
        grid = np.arange(max(width, height) + 1)
        fractions = [np.searchsorted(np.sort(boxes[:, side]), grid) / len(boxes) for boxes in (ours, theirs)]
        assert np.abs(fractions[0] - fractions[1]).max() < 0.025  # Kolmogorov-Smirnov, p < 1e-5


def test_the_other_draws_have_the_recipes_frequencies() -> None:
    plans = plans_of(500, 375)
    assert abs(plans["flip"].mean() - 0.5) < 0.02
    assert abs(plans["cubic"].mean() - 0.5) < 0.02
    kinds = plans["ops"]["kind"].ravel()
    assert abs((kinds > 0).mean() - 0.5) < 0.01
    counts = np.bincount(kinds[kinds > 0], minlength=12)[1:] / (kinds > 0).sum()
    np.testing.assert_allclose(counts, [1 / 15] * 10 + [5 / 15], atol=0.01)  # the last are affine
    words = uniforms(CLASSIFIER_AUGMENTATION, 0, blocks=9, epoch=0, sample=np.arange(20_000))[:, 24:30]
    chosen = [choose_operation(PAPER_AUGMENTATION, row) for row in words]
    shears = np.array([value / 0.03 for name, value, _ in chosen if name in ("ShearX", "ShearY")])
    assert abs(np.abs(shears).mean() - 8.99) < 0.05  # a little below 9: 10 is the most
    assert abs(np.abs(shears).std() - 0.48) < 0.05
    assert abs((shears < 0).mean() - 0.5) < 0.05


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 5000), (5000, 1), (2, 3)])
def test_crops_of_extreme_images_lie_inside(width: int, height: int) -> None:
    left, top, w, h = plans_of(width, height, 500)["box"].T
    assert min(left.min(), top.min()) >= 0
    assert min(w.min(), h.min()) >= 1
    assert (left + w).max() <= width
    assert (top + h).max() <= height


def test_rand_augment_can_be_left_out_and_is_checked() -> None:
    plans = plans_of(500, 375, 100, TrainAugmentation(rand_augment=None, hflip=0.0, interpolation=("bicubic",)))
    assert not plans["ops"]["kind"].any()
    assert not plans["flip"].any()
    assert plans["cubic"].all()
    with pytest.raises(UserError, match="not of the form rand"):
        TrainAugmentation(rand_augment="rand-m9-mstd0.5")


def test_a_crop_outside_of_the_image_and_short_raw_pixels_are_refused() -> None:
    image = np.zeros((4, 5, 3), np.uint8)
    with pytest.raises(pixels.SampleError, match="outside"):
        pixels.resize_crop(image, (1, 0, 5, 4), 8, "bilinear")
    source, plan = np.zeros(1, pixels.SOURCE), np.zeros(1, pixels.PLAN)
    source[0] = (image.ctypes.data, image.nbytes - 1, 5, 4, 1, 0)
    plan["box"], plan["resized"] = (0, 0, 5, 4), 8
    with pytest.raises(pixels.SampleError, match="width x height x 3"):
        pixels.make_batch(source, plan, np.empty((1, 8, 8, 3), np.uint8), workers=1)
