"""Every C function from several threads at once, results held against one thread's: for the sanitizers.

`python native_exercise.py FOLDER` with the compiled modules `_pixels` and `_block` found in the package on the path.
"""

import ctypes
import importlib.util
import io
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.ctypeslib import ndpointer
from PIL import Image

from pipeline.data import pixels
from pipeline.data.draws import PAPER_AUGMENTATION, eval_plans, train_plans

THREADS, WORKERS, BATCH, SIZE_PX = 3, 3, 24, 40


def files() -> list[bytes]:
    """JPEGs of many kinds; some are cut short, or have other bits in their scan."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(BATCH):
        height, width = (int(side) for side in rng.integers(8, 120, 2))
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        content = io.BytesIO()
        image.save(content, "JPEG", quality=80, subsampling=number % 3, progressive=number % 5 == 4)
        data = bytearray(content.getvalue())
        if number % 4 == 3:
            data[len(data) // 2] ^= 0x55
        made.append(bytes(data[: len(data) // 2] if number % 11 == 10 else data))
    return made


def batch(contents: list[bytes], epoch: int) -> bytes:
    """A batch of training images, or the error that keeps it from being made."""
    arrays = [np.frombuffer(content, np.uint8) for content in contents]
    sizes = np.array([Image.open(io.BytesIO(content)).size for content in contents])
    sources = np.zeros(len(arrays), pixels.SOURCE)
    for source, array, (width, height) in zip(sources, arrays, sizes, strict=True):
        source["data"], source["size_bytes"] = array.ctypes.data, array.nbytes
        source["width"], source["height"] = width, height
    ids, widths, heights = np.arange(len(arrays)), sizes[:, 0], sizes[:, 1]
    if epoch % 3:
        plans = train_plans(
            PAPER_AUGMENTATION, seed=0, epoch=epoch, sample_ids=ids, widths=widths, heights=heights, image_size=SIZE_PX
        )
    else:
        plans = eval_plans(widths, heights, image_size=SIZE_PX, crop_fraction=0.9)
    out = np.zeros((len(arrays), SIZE_PX, SIZE_PX, 3), np.uint8)
    try:
        pixels.make_batch(sources, plans, out, WORKERS)
    except pixels.SampleError as error:
        return f"{error.position}: {error.reason}".encode()
    return out.tobytes()


def image_functions(contents: list[bytes], epoch: int) -> bytes:
    """Decoder, check, operations and random words, one after the other."""
    rng, answers = np.random.default_rng(epoch), []
    for content in contents:
        width, height = Image.open(io.BytesIO(content)).size
        answers.append(bytes([pixels.is_whole_jpeg(content, width, height)]))
        try:
            image = pixels.decode_jpeg(content, (width // 3, height // 3, width // 2, height // 2))
        except pixels.SampleError:
            continue
        for name in pixels.OPERATIONS:
            answers.append(pixels.apply_op(image, name, float(rng.uniform(0.1, 4)), "bicubic").tobytes())
        box = (0, 0, image.shape[1], image.shape[0])
        answers.append(pixels.resize_crop(image, box, int(rng.integers(1, 64)), "bicubic", flip=True).tobytes())
    counters = rng.integers(0, 2**63, (17, 4)).astype(np.uint64)
    return b"".join(answers) + pixels.philox((3, epoch), counters, 3).tobytes()


def fused_block(epoch: int) -> bytes:
    """Token mixer and residual addition of models/native/block.c on a shape that no vector fits."""
    spec = importlib.util.find_spec("pipeline.models._block")
    assert spec is not None
    library = ctypes.CDLL(spec.origin)
    floats, halves = ndpointer(np.float32, flags="C"), ndpointer(np.uint16, flags="C")
    long = ctypes.c_int64
    library.mix_tokens.argtypes = [*[floats] * 5, halves, ctypes.c_float, long, long, long, long, ctypes.c_int]
    library.add_scaled.argtypes = [floats, halves, floats, long, long, ctypes.c_int]
    library.add_scaled.restype = None
    rng = np.random.default_rng(epoch)
    images, height, width, channels = (int(side) for side in rng.integers(1, [6, 9, 9, 150]))
    x = rng.standard_normal((images, height, width, channels)).astype(np.float32)
    y, normed = np.zeros_like(x), np.zeros(x.shape, np.uint16)
    mix_scale, weight, bias = (rng.standard_normal(channels).astype(np.float32) for _ in range(3))
    assert not library.mix_tokens(x, mix_scale, weight, bias, y, normed, 1e-5, images, height, width, channels, WORKERS)
    mixed = y.tobytes()
    library.add_scaled(y, normed, weight, images * height * width, channels, WORKERS)
    return mixed + y.tobytes() + normed.tobytes()


def main(rounds: int) -> None:
    broken = files()
    whole = [content for content in broken if pixels.is_whole_jpeg(content, *Image.open(io.BytesIO(content)).size)]
    assert 4 < len(whole) < len(broken)
    calls: list[Callable[[int], bytes]] = [
        lambda epoch: batch(whole, epoch),
        lambda epoch: batch(broken, epoch),
        lambda epoch: image_functions(broken, epoch),
        fused_block,
    ]
    work = [(call, epoch) for epoch in range(rounds) for call in calls]
    expected = [call(epoch) for call, epoch in work]
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(2):
            assert list(pool.map(lambda item: item[0](item[1]), work)) == expected


if __name__ == "__main__":
    main(int(sys.argv[1]))
