"""The random numbers are numpy's for a key and counter that are written down here once more."""

from typing import Any

import numpy as np
import pytest

from pipeline.data import random
from pipeline.data.random import Purpose, derived_seed, float32_uniforms, generator, uniforms

SEED = 2**40 + 9
PLACE = {"epoch": 3, "sample": 2**33 + 5, "scene": 7, "layer": 11, "step": 13, "group": 17}
PHILOX = {  # purpose -> key, counter at PLACE
    "CLASSIFIER_ORDER": (0, [0, 0, 3, 0]),
    "CLASSIFIER_AUGMENTATION": (1, [0, 2**33 + 5, 3, 0]),
    "SEGMENTER_ORDER": (1, [0, 0, 0, 3]),
    "SEGMENTER_AUGMENTATION": (2, [0, 0, 2**33 + 5, 3]),
    "TRAINING_SCENE": (0, [0, 0, 7, 0]),
    "VALIDATION_SCENE": (1, [0, 0, 7, 0]),
    "DROPOUT": (0x64726F70, [0, 0, 11, 13]),
}
DERIVED = {"MIXING": (0x6D6978, [13, 17]), "ERASING": (0x657261, [3, 2**33 + 5])}
OLDEST_KEYS = {0, 1}


def place_of(purpose: Purpose) -> dict[str, Any]:
    return {name: PLACE[name] for name in purpose.place if name}


def philox(name: str) -> np.random.Philox:
    key, counter = PHILOX[name]
    return np.random.Philox(key=[SEED, key], counter=counter)


def test_every_purpose_is_checked_here_and_new_keys_are_their_own() -> None:
    purposes = {name: value for name, value in vars(random).items() if isinstance(value, Purpose)}
    assert set(purposes) == {*PHILOX, *DERIVED}
    keys = [purpose.key for purpose in purposes.values() if purpose.key not in OLDEST_KEYS]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("name", PHILOX)
def test_counted_numbers_are_numpys(name: str) -> None:
    purpose: Purpose = getattr(random, name)
    place = place_of(purpose)
    words = philox(name).random_raw(12)
    assert np.array_equal(generator(purpose, SEED, **place).bit_generator.random_raw(12), words)
    several = {key: np.array([value, value + 1]) for key, value in place.items()}
    rows = uniforms(purpose, SEED, blocks=3, **several)
    assert np.array_equal(rows[0], (words >> np.uint64(11)) * 2.0**-53)
    assert not np.isin(rows[1], rows[0]).any()
    numbers = np.random.Generator(philox(name)).random(40, dtype=np.float32)
    for first in (0, 5, 8, 23):
        assert np.array_equal(float32_uniforms(purpose, SEED, first, 17, **place), numbers[first : first + 17])


@pytest.mark.parametrize("name", DERIVED)
def test_derived_seeds_are_numpys(name: str) -> None:
    purpose: Purpose = getattr(random, name)
    key, words = DERIVED[name]
    (expected,) = np.random.SeedSequence([SEED, key, *words]).generate_state(1)
    assert derived_seed(purpose, SEED, **place_of(purpose)) == expected


def test_numbers_belong_to_seed_purpose_and_each_word_of_the_place() -> None:
    purpose, samples = random.CLASSIFIER_AUGMENTATION, np.arange(50)
    numbers = uniforms(purpose, 3, blocks=2, epoch=7, sample=samples)
    assert numbers.shape == (50, 8)
    assert 0 <= numbers.min() < numbers.max() < 1
    some = samples[[41, 5]]
    assert np.array_equal(uniforms(purpose, 3, blocks=2, epoch=7, sample=some), numbers[[41, 5]])
    others = [
        uniforms(purpose, 4, blocks=2, epoch=7, sample=samples),
        uniforms(purpose, 3, blocks=2, epoch=8, sample=samples),
        uniforms(purpose, 3, blocks=2, epoch=7, sample=samples + 50),
        uniforms(Purpose(99, purpose.place), 3, blocks=2, epoch=7, sample=samples),
    ]
    assert not any(np.isin(other, numbers).any() for other in others)


@pytest.mark.parametrize("place", [{}, {"epoch": 1}, {"epoch": 1, "sample": 2, "step": 3}, {"step": 1, "sample": 2}])
def test_a_place_with_other_words_is_refused(place: dict[str, int]) -> None:
    with pytest.raises(TypeError, match="a place is"):
        generator(random.CLASSIFIER_AUGMENTATION, 0, **place)
