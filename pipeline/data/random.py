"""Every random number that a result depends on: what it is for, and where it is counted.

The numbers are stateless: each is a function of (seed, purpose, place), where a place is, say, a sample in an epoch.
The number of workers or ranks, accumulation and a resume change none, and nothing draws from a global stream.

Two kinds of generators give them:

- Philox4x64-10 for what is ours (`generator`, `uniforms`, `float32_uniforms`). Its key is (seed, the purpose's key).
  Its counter has four words: the first is the generator's to advance, the other three are the place.
- The library's own generator for what has to be timm's numbers: numpy's RandomState, Python's Random and torch's,
  seeded for one place with `derived_seed`, a function of (seed, the purpose's key, the place).

One thing is a stream: a model's first weights, which are those after `torch.manual_seed(seed)`. One thread draws them,
once, from a generator that nothing else reads (SeededInitialisation, where tasks create their models).

The purposes are constants and not members of an enum. A training depends on the definitions that it reaches: one more
member would make every result stale, one more constant makes none. A new purpose takes a key that no other has. The
oldest ones share 0 and 1 between tasks, whose trainings and data have nothing to do with one another.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from pipeline.data.pixels import philox

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Word = TypeVar("Word")


@dataclass(frozen=True)
class Purpose:
    """What numbers are for."""

    key: int
    place: tuple[str, ...]
    """What each word of the place counts; "" is a word that stays 0."""

    def words(self, **place: Word) -> list[Word | int]:
        """The place's words in their order."""
        if set(place) != set(self.place) - {""}:
            raise TypeError(f"a place is {self.place}, not {tuple(place)}")
        return [place[name] if name else 0 for name in self.place]


# Philox: the three words of the place are the counter's last three.
CLASSIFIER_ORDER = Purpose(0, ("", "epoch", ""))
"""`generator`: the order in which an epoch visits the images."""
CLASSIFIER_AUGMENTATION = Purpose(1, ("sample", "epoch", ""))
"""`uniforms`: crop, flip, filter and RandAugment of an image."""
SEGMENTER_ORDER = Purpose(1, ("", "", "epoch"))
"""`generator`: the order in which an epoch visits the images."""
SEGMENTER_AUGMENTATION = Purpose(2, ("", "sample", "epoch"))
"""`generator`: scale, crop, flip and distortion of an image."""
TRAINING_SCENE = Purpose(0, ("", "scene", ""))
"""`generator`: what a scene of the demo's training data shows."""
VALIDATION_SCENE = Purpose(1, ("", "scene", ""))
"""`generator`: what a scene of the demo's validation data shows."""
DROPOUT = Purpose(0x64726F70, ("", "layer", "step"))
"""`float32_uniforms`: drop path and dropout, the rows of the global batch one after the other. The key reads "drop"."""

# Seeds derived for one place.
MIXING = Purpose(0x6D6978, ("step", "group"))
"""`derived_seed` of numpy's RandomState: mixup and CutMix of a group of the global batch. The key reads "mix"."""
ERASING = Purpose(0x657261, ("epoch", "sample"))
"""`derived_seed` of Python's Random for the box, and of torch's generator for the noise in it. The key reads "era"."""

FLOAT32_PER_COUNT = 8
"""float32 numbers that numpy's Generator makes from one count of Philox: two from each of the four words."""


def generator(purpose: Purpose, seed: int, *, count: int = 0, **place: int) -> np.random.Generator:
    """A generator for one place, which may draw as much as it likes; `count` is the counter's first word."""
    counter = [count, *purpose.words(**place)]
    return np.random.Generator(np.random.Philox(key=[seed, purpose.key], counter=counter))


def uniforms(purpose: Purpose, seed: int, *, blocks: int, **place: int | Ints) -> Floats:
    """`(N, 4 * blocks)` numbers in [0, 1) for N places, each row a function of its own place.

    `place` has an array of N, or a number, for each word.
    """
    counters = np.stack(np.broadcast_arrays(0, *purpose.words(**place)), axis=-1).astype(np.uint64)
    words = philox((seed, purpose.key), counters, blocks) >> np.uint64(11)
    return words.astype(np.float64) * 2.0**-53


def float32_uniforms(purpose: Purpose, seed: int, first: int, count: int, **place: int) -> npt.NDArray[np.float32]:
    """`count` numbers in [0, 1) of one place's sequence, from its number `first` on, without making those before."""
    counts, skipped = divmod(first, FLOAT32_PER_COUNT)
    numbers = generator(purpose, seed, count=counts, **place).random(skipped + count, dtype=np.float32)
    return numbers[skipped:]


def derived_seed(purpose: Purpose, seed: int, **place: int) -> int:
    """32 bits for one place, to seed a generator of another library with."""
    return int(np.random.SeedSequence([seed, purpose.key, *purpose.words(**place)]).generate_state(1)[0])
