"""The C code under sanitizers, fuzzed against Pillow, and its callers beside threads that allocate and draw.

`make fuzz` gives the fuzzer an hour in place of some seconds (FUZZ_S).
"""

import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from pipeline.data import convert_image_folder, pixels, train_loader
from pipeline.tasks.on_device import Mixing, erase, mix, normalise

pytestmark = pytest.mark.slow

FUZZ_S = float(os.environ.get("FUZZ_S", "0"))
PLAIN_ADD = "*(volatile int64_t *)&batch->next; *(volatile int64_t *)&batch->next = i + 1"
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}


def built_with(sanitizer: str, folder: Path, damage: tuple[str, str, str] | None = None) -> dict[str, str]:
    """Copy the package to `folder` and compile its C code with a sanitizer; the environment to run it in.

    `damage` is a file, what to replace in it, and by what.
    """
    shutil.copytree(ROOT / "pipeline", folder / "pipeline", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    if damage:
        file, line, replacement = folder / damage[0], *damage[1:]
        assert file.read_text().count(line) == 1
        file.write_text(file.read_text().replace(line, replacement))
    for module in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]:
        target = folder / (module["name"].replace(".", "/") + str(sysconfig.get_config_var("EXT_SUFFIX")))
        flags = [*module["extra-compile-args"], "-O1", "-g", *SANITIZERS[sanitizer], "-fPIC", "-shared"]
        libraries = [f"-l{name}" for name in module.get("libraries", [])]
        command = ["gcc", *flags, f"-I{sysconfig.get_path('include')}", *module["sources"], *libraries]
        subprocess.run([*command, "-o", str(target)], cwd=folder, check=True)
    name = {"address": "libasan.so", "thread": "libtsan.so"}[sanitizer]
    runtime = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return {
        **os.environ,
        "PYTHONPATH": str(folder),
        "LD_PRELOAD": runtime.stdout.strip(),
        "OPENBLAS_NUM_THREADS": "1",
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # Python itself leaks at its end
        "TSAN_OPTIONS": "halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def run_script(name: str, *arguments: object, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    # TSan wants its addresses where they are without randomisation.
    command = ["setarch", "-R", sys.executable, str(ROOT / "tests" / name), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_sanitizers_find_nothing_in_any_function(sanitizer: str, tmp_path: Path) -> None:
    done = run_script("native_exercise.py", 2, cwd=tmp_path, env=built_with(sanitizer, tmp_path))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("sanitizer", "damage", "complaint"),
    [
        (
            "address",
            ("pipeline/data/native/huffman.c", "size_bytes + PADDING_BYTES)", "size_bytes)"),
            "buffer-overflow",
        ),
        ("thread", ("pipeline/data/native/pixels.c", "atomic_fetch_add(&batch->next, 1)", PLAIN_ADD), "data race"),
    ],
)
def test_the_sanitizers_find_what_is_wrong(
    sanitizer: str, damage: tuple[str, str, str], complaint: str, tmp_path: Path
) -> None:
    done = run_script("native_exercise.py", 2, cwd=tmp_path, env=built_with(sanitizer, tmp_path, damage))
    assert done.returncode != 0
    assert complaint in done.stderr


def test_mutated_jpegs_have_pillows_pixels_or_are_refused_and_crash_nothing(tmp_path: Path) -> None:
    seed = int(time.time()) if FUZZ_S else 1
    done = run_script("jpeg_fuzzer.py", FUZZ_S or 10, seed, cwd=tmp_path, env=built_with("address", tmp_path))
    assert done.returncode == 0, f"seed {seed}: {done.stdout}{done.stderr}"
    seen = json.loads(done.stdout)
    assert min(seen["refused"], seen["stored as JPEG"], seen["stored as pixels"]) > 10, seen


@contextmanager
def busy_threads() -> Iterator[None]:
    """Two threads that make small arrays, and draw from every global stream of random numbers."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            kept = [np.array((number, number + 1), np.uint64) for number in range(20)]
            kept.append(np.random.random(2))
            random.random()
            torch.rand(2)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)


def test_ten_thousand_batches_beside_busy_threads_are_the_same(tmp_path: Path) -> None:
    """From the .beton to what the model gets: augmented, mixed, erased."""
    rng = np.random.default_rng(0)
    for number in range(500):
        file = tmp_path / f"images/{number % 2}/{number}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 14, 3), dtype=np.uint8)).save(file)
    beton = tmp_path / "train.beton"
    convert_image_folder(tmp_path / "images", beton, workers=1)
    mixing = Mixing(0.8, 1.0, label_smoothing=0.1, num_classes=2)

    def digests(epochs: int) -> list[bytes]:
        made = []
        for epoch in range(epochs):
            for step, batch in enumerate(
                train_loader(beton, batch_size=2, seed=3, epoch=epoch, workers=1, image_size=8)
            ):
                images, labels = mix(batch.images, batch.labels, mixing, 2, 3, 250 * epoch + step, 0)
                images = erase(normalise(images), batch.sample_ids, 0.25, 3, epoch)
                made.append(sha256(images.numpy().tobytes() + labels.numpy().tobytes()).digest()[:8])
        return made

    expected = digests(40)
    with busy_threads():
        assert digests(40) == expected
    assert len(set(expected)) == len(expected) == 10_000


def test_philox_beside_busy_threads_gives_the_same_words() -> None:
    counters = np.zeros((16, 4), np.uint64)
    counters[:, 1] = np.arange(16)
    expected = pixels.philox((3, 1), counters, 10)
    with busy_threads():
        assert all(np.array_equal(pixels.philox((3, 1), counters, 10), expected) for _ in range(20_000))
