"""Mutated JPEGs through conversion and decoder, against Pillow: `python jpeg_fuzzer.py SECONDS SEED`.

What conversion accepts has to have Pillow's pixels, whole and by box; what Pillow refuses has to be refused; nothing
may crash the decoder. Prints what it tried. At the first difference it keeps the file and ends with status 1.
"""

import io
import json
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data import pixels
from pipeline.data.stored import original_sample
from pipeline.errors import UserError

LARGEST_PX = 1 << 21  # a mutated header may claim gigapixels


def originals(rng: np.random.Generator) -> list[bytes]:
    """Small JPEGs of every kind that Pillow writes, with smooth and with noisy parts."""
    made = []
    for number in range(48):
        width, height = (int(side) for side in rng.integers(1, 90, 2))
        rows, columns = np.mgrid[:height, :width]
        smooth = np.stack([rows * 3 + columns, rows - columns, columns * 5], axis=2)
        noise = rng.integers(0, 1 + 80 * (number % 3), (height, width, 3))
        image = Image.fromarray(((smooth + noise) % 256).astype(np.uint8))
        content = io.BytesIO()
        image.convert("L" if number % 8 == 7 else "RGB").save(
            content,
            "JPEG",
            quality=int(rng.integers(5, 100)),
            subsampling=number % 3,
            progressive=number % 6 == 5,
            optimize=number % 2 == 1,
            restart_marker_blocks=int(rng.integers(1, 9)) if number % 5 == 4 else 0,
        )
        made.append(content.getvalue())
    return made


def mutate(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """One to four changes, most of them behind the headers."""
    content = bytearray(data)
    scan = data.find(b"\xff\xda")
    for _ in range(int(rng.integers(1, 5))):
        first = scan if rng.random() < 0.7 and scan < len(content) - 4 else 2
        place = int(rng.integers(first, len(content)))
        match int(rng.integers(6)):
            case 0:
                content[place] ^= 1 << int(rng.integers(8))
            case 1:
                content[place] = int(rng.choice([0x00, 0xFF, 0xD0, 0xD9, 0xDA, int(rng.integers(256))]))
            case 2:
                del content[place : place + int(rng.integers(1, 40))]
            case 3:
                content[place:place] = content[place : place + int(rng.integers(1, 40))]
            case 4:
                start = int(rng.integers(len(other)))
                length = int(rng.integers(1, 60))
                content[place : place + length] = other[start : start + length]
            case _:
                content[place : place + 2] = bytes([0xFF, int(rng.integers(0xC0, 0x100))])
        if len(content) < 8:
            break
    return bytes(content)


def difference(data: bytes, path: Path, rng: np.random.Generator, seen: Counter[str]) -> str | None:
    """What is wrong with what becomes of a file, if anything."""
    whole = decoded(data)  # whatever conversion thinks of it
    path.write_bytes(data)
    try:
        sample = original_sample(str(path), path.read_bytes())
    except UserError:
        seen["refused"] += 1
        return None
    if sample.width * sample.height > LARGEST_PX:
        seen["too large to compare"] += 1
        return None
    seen["stored as JPEG" if sample.mode == "jpg" else "stored as pixels"] += 1
    try:
        expected = np.array(Image.open(path).convert("RGB"))
    except Exception as error:  # Pillow's plugins raise what they like on bad data
        return f"accepted by conversion, refused by Pillow: {error}"
    if sample.mode == "raw":
        return None if sample.blobs[0] == expected.tobytes() else "conversion stored other pixels than Pillow's"
    if whole is None or not np.array_equal(whole, expected):
        return "the decoder gives other pixels than Pillow"
    height, width = expected.shape[:2]
    for _ in range(3):
        w, h = int(rng.integers(1, width + 1)), int(rng.integers(1, height + 1))
        left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
        part = decoded(data, (left, top, w, h))
        if part is None or not np.array_equal(part, expected[top : top + h, left : left + w]):
            return f"the decoder gives other pixels than Pillow in the box {left, top, w, h}"
    return None


def decoded(data: bytes, box: pixels.Box | None = None) -> np.ndarray | None:
    """What the decoder makes of a file of a size that can be compared; None where it, or Pillow its header, refuses."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            too_large = image.width * image.height > LARGEST_PX
        return None if too_large else pixels.decode_jpeg(data, box)
    except pixels.SampleError:
        return None
    except Exception:  # Pillow's plugins raise what they like on bad data
        return None


def main(seconds: float, seed: int) -> int:
    rng, seen = np.random.default_rng(seed), Counter[str]()
    deadline = time.monotonic() + seconds
    path = Path(tempfile.mkdtemp()) / "mutant.JPEG"
    while time.monotonic() < deadline:
        files = originals(rng)
        for _ in range(2000):
            data = mutate(files[int(rng.integers(len(files)))], files[int(rng.integers(len(files)))], rng)
            if what := difference(data, path, rng, seen):
                print(f"{what}: {path}")
                return 1
            if time.monotonic() > deadline:
                break
    shutil.rmtree(path.parent)
    print(json.dumps(seen))
    return 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # Pillow's, about sizes that a mutated header claims
    sys.exit(main(float(sys.argv[1]), int(sys.argv[2])))
