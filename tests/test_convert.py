"""Image folders to .beton files: what is stored, that FFCV reads it, and how conversion fails."""

import io
import resource
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from ffcv.loader import Loader, OrderOption
from ffcv.reader import Reader
from ffcv.types import HeaderType
from PIL import Image
from sklearn.datasets import load_sample_image

from pipeline import paths
from pipeline.data import convert_image_folder
from pipeline.data.beton import open_beton
from pipeline.data.folders import list_image_folder, write_listing
from pipeline.data.manifest import read_manifest, verify_beton
from pipeline.data.stored import COMPACT_SHORT_SIDE_PX, plain_jpeg_size
from pipeline.errors import UserError

Storage = Literal["original", "compact"]
PHOTO = Image.fromarray(load_sample_image("china.jpg"))  # 640x427


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_photos(folder: Path, per_class: int = 6) -> None:
    """Crops of a real photograph, of many sizes, in three classes."""
    random = np.random.default_rng(0)
    for number in range(3 * per_class):
        width, height = random.integers((100, 80), (600, 400))
        left, top = random.integers((640 - width, 427 - height))
        crop = PHOTO.crop((left, top, left + width, top + height))
        path = folder / f"n{number % 3:08d}" / f"n{number % 3:08d}_{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(crop, "JPEG", quality=int(random.integers(60, 96))))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_photos(tmp_path / "photos")
    return tmp_path / "photos"


@pytest.fixture
def beton(photos: Path, tmp_path: Path) -> Path:
    path = tmp_path / "out" / "photos.beton"
    convert_image_folder(photos, path, workers=2)
    return path


def one_image_folder(tmp_path: Path, data: bytes, name: str = "image.JPEG") -> Path:
    (tmp_path / "images" / "class").mkdir(parents=True)
    (tmp_path / "images" / "class" / name).write_bytes(data)
    return tmp_path / "images"


def stored_bytes(beton: Path) -> list[bytes]:
    """What FFCV's own Reader says is stored, sample by sample."""
    reader, data = Reader(str(beton)), beton.read_bytes()
    return [data[row["ptr"] : row["ptr"] + row["size"]] for row in reader.alloc_table]


# --- what is stored ------------------------------------------------------------------------------


def test_original_storage_keeps_every_byte_in_the_folders_order(photos: Path, beton: Path) -> None:
    files = sorted(photos.rglob("*.JPEG"), key=lambda path: (path.parent.name, path.name))
    reader = Reader(str(beton))
    assert reader.field_names == ["image", "label"]
    assert stored_bytes(beton) == [path.read_bytes() for path in files]
    assert reader.metadata["f1"].tolist() == [int(path.parent.name[1:]) for path in files]
    sizes = [Image.open(path).size for path in files]
    assert [(row["width"], row["height"]) for row in reader.metadata["f0"]] == sizes
    rows = list(read_manifest(beton))
    assert [row.path for row in rows] == [str(path.relative_to(photos)) for path in files]
    assert [row.bytes for row in rows] == [path.stat().st_size for path in files]


def test_ffcvs_own_loader_decodes_what_is_stored(tmp_path: Path) -> None:
    for number, kind in enumerate(("JPEG", "PNG", "JPEG")):
        path = tmp_path / "images" / f"class_{number}" / "image.JPEG"
        path.parent.mkdir(parents=True)
        path.write_bytes(encoded(PHOTO.crop((100 * number, 100, 100 * number + 64, 148)), kind))
    expected = [np.asarray(Image.open(path), int) for path in sorted(tmp_path.rglob("*.JPEG"))]
    convert_image_folder(tmp_path / "images", tmp_path / "x.beton", workers=1)
    loader = Loader(str(tmp_path / "x.beton"), 3, num_workers=1, order=OrderOption.SEQUENTIAL)
    ((images, labels),) = list(loader)
    assert labels.ravel().tolist() == [0, 1, 2]
    assert np.array_equal(images[1], expected[1])
    for number in (0, 2):  # FFCV decodes JPEGs with the fast DCT, Pillow with the accurate one
        assert np.abs(images[number].numpy() - expected[number]).mean() < 1


@pytest.mark.parametrize("storage", ["original", "compact"])
def test_the_file_does_not_depend_on_the_number_of_workers(photos: Path, tmp_path: Path, storage: Storage) -> None:
    files = []
    for workers in (1, 2, 4):
        beton = tmp_path / f"{workers}.beton"
        convert_image_folder(photos, beton, storage=storage, workers=workers)
        files.append((beton.read_bytes(), paths.manifest(beton).read_bytes()))
    assert files[0] == files[1] == files[2]


def sixteen_bit() -> bytes:
    levels = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    return encoded(Image.fromarray(levels), "PNG")


def rotated_by_exif() -> bytes:
    exif = Image.Exif()
    exif[274] = 6
    return encoded(PHOTO.crop((0, 0, 60, 40)), "JPEG", exif=exif)


PALETTE = PHOTO.resize((64, 40)).convert("P", palette=Image.Palette.ADAPTIVE)
ODD_IMAGES: dict[str, tuple[Callable[[], bytes], str]] = {
    "png": (lambda: encoded(PHOTO.resize((64, 40)), "PNG"), "raw"),
    "16-bit png": (sixteen_bit, "raw"),
    "palette with a transparent colour": (lambda: encoded(PALETTE, "PNG", transparency=3), "raw"),
    "palette with alpha": (
        lambda: encoded(PALETTE, "PNG", transparency=bytes(range(256))),
        "raw",
    ),
    "grey and alpha": (lambda: encoded(PHOTO.resize((9, 7)).convert("LA"), "PNG"), "raw"),
    "one bit": (lambda: encoded(PHOTO.resize((9, 7)).convert("1"), "PNG"), "raw"),
    "webp": (lambda: encoded(PHOTO.resize((64, 40)), "WEBP", lossless=True), "raw"),
    "cmyk": (lambda: encoded(PHOTO.resize((64, 40)).convert("CMYK"), "JPEG"), "raw"),
    "greyscale": (lambda: encoded(PHOTO.resize((64, 40)).convert("L"), "JPEG"), "jpg"),
    "progressive": (lambda: encoded(PHOTO, "JPEG", progressive=True, quality=95), "jpg"),
    "restart markers": (lambda: encoded(PHOTO, "JPEG", restart_marker_rows=1), "jpg"),
    "no subsampling": (lambda: encoded(PHOTO, "JPEG", subsampling=0, optimize=True), "jpg"),
    "rotated by exif": (rotated_by_exif, "jpg"),
    "thumbnail and trailing bytes": (
        lambda: encoded(PHOTO, "JPEG", exif=b"Exif\0\0" + encoded(PHOTO.resize((9, 7)), "JPEG")) + b"\xff\xd8 trailing",
        "jpg",
    ),
    "1x1": (lambda: encoded(PHOTO.resize((1, 1)), "JPEG"), "jpg"),
    "1x5000": (lambda: encoded(PHOTO.resize((1, 5000)), "JPEG"), "jpg"),
    "5000x1 png": (lambda: encoded(PHOTO.resize((5000, 1)), "PNG"), "raw"),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("kind", ODD_IMAGES)
def test_an_odd_image_is_kept_as_pillows_rgb(tmp_path: Path, kind: str) -> None:
    make, mode = ODD_IMAGES[kind]
    data = make()
    storages: tuple[Storage, ...] = ("original", "compact")
    for storage in storages:
        beton = tmp_path / f"{storage}.beton"
        folder = tmp_path / "images"
        if not folder.exists():
            one_image_folder(tmp_path, data)
        convert_image_folder(folder, beton, storage=storage, workers=1)
        (stored,), (row,) = stored_bytes(beton), read_manifest(beton)
        rgb = Image.open(io.BytesIO(data)).convert("RGB")
        if storage == "compact" and min(rgb.size) > COMPACT_SHORT_SIDE_PX:
            assert min(row.width, row.height) == COMPACT_SHORT_SIDE_PX
            continue
        assert (row.mode, row.width, row.height) == (mode, *rgb.size)
        assert stored == (data if mode == "jpg" else rgb.tobytes())
        assert verify_beton(beton) == 1


def test_compact_storage_shrinks_what_is_large_and_stays_close(tmp_path: Path) -> None:
    data = encoded(PHOTO, "JPEG", quality=95)
    one_image_folder(tmp_path, data)
    convert_image_folder(tmp_path / "images", tmp_path / "x.beton", storage="compact", workers=1)
    (stored,) = stored_bytes(tmp_path / "x.beton")
    image = Image.open(io.BytesIO(stored))
    assert image.size == (432, 288)
    assert len(stored) < len(data) / 2
    expected = Image.open(io.BytesIO(data)).resize(image.size, Image.Resampling.LANCZOS)
    error = np.asarray(image, float) - np.asarray(expected, float)
    assert 10 * np.log10(255**2 / (error**2).mean()) > 33  # dB


def test_a_sample_larger_than_a_page_gets_larger_pages(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (3, 1700, 1800, 3), dtype=np.uint8)  # 9.2 MB each
    for number in range(3):
        path = tmp_path / "images" / "class" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(Image.fromarray(pixels[number]), "PNG", compress_level=0))
    beton = tmp_path / "x.beton"
    convert_image_folder(tmp_path / "images", beton, workers=2)
    reader = open_beton(beton)
    assert reader.page_size == 1 << 24
    table = reader.alloc_table
    assert (table["ptr"] // reader.page_size == (table["ptr"] + table["size"] - 1) // reader.page_size).all()
    loader = Loader(str(beton), 3, num_workers=1, os_cache=False)  # FFCV reads whole pages
    ((images, _),) = list(loader)
    assert np.array_equal(images, pixels)


# --- what is refused -----------------------------------------------------------------------------


JPEG = encoded(PHOTO, "JPEG", quality=90)
REFUSED = {
    "zero bytes": (b"", "is empty"),
    "html": (b"<!DOCTYPE html><title>404</title>", "is not an image"),
    "half a jpeg": (JPEG[: len(JPEG) // 2], "cannot be decoded"),
    "half a progressive jpeg": (
        encoded(PHOTO, "JPEG", progressive=True)[:20_000],
        "cannot be decoded",
    ),
    "a jpeg's header": (JPEG[:200], "cannot be decoded|is not an image"),
    "half a png": (encoded(PHOTO, "PNG")[:50_000], "cannot be decoded"),
    "half a cmyk jpeg": (encoded(PHOTO.convert("CMYK"), "JPEG")[:20_000], "cannot be decoded"),
    "random bytes": (np.random.default_rng(0).bytes(5000), "is not an image"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("storage", ["original", "compact"])
def test_a_bad_image_is_refused_by_name_and_nothing_is_left(
    photos: Path, tmp_path: Path, kind: str, storage: Storage
) -> None:
    data, reason = REFUSED[kind]
    (photos / "n00000001" / "bad.JPEG").write_bytes(data)
    out = tmp_path / "out"
    out.mkdir()
    (out / "x.beton").write_bytes(b"of an earlier conversion")
    with pytest.raises(UserError, match=f"n00000001/bad.JPEG.*({reason})"):
        convert_image_folder(photos, out / "x.beton", storage=storage, workers=2)
    assert list(out.iterdir()) == []


def test_every_truncation_of_a_jpeg_is_noticed() -> None:
    assert plain_jpeg_size(JPEG) == (640, 427)
    cuts = [*range(0, 700), *range(700, len(JPEG), 997), len(JPEG) - 2, len(JPEG) - 1]
    assert [cut for cut in cuts if plain_jpeg_size(JPEG[:cut])] == []


def test_a_wrong_marker_inside_a_jpeg_is_noticed(tmp_path: Path) -> None:
    """Pillow refuses such a file, though only once it has decoded all of its pixels."""
    one_image_folder(tmp_path, JPEG[:20_000] + b"\xff\xc9\x00\x01\xff" + JPEG[20_005:])
    with pytest.raises(UserError, match=r"image\.JPEG cannot be decoded"):
        convert_image_folder(tmp_path / "images", tmp_path / "x.beton", workers=1)


def test_a_full_disk_is_one_clear_error(photos: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((8 << 20) + 100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"x\.beton cannot be written: .*make room"):
            convert_image_folder(photos, tmp_path / "out" / "x.beton", workers=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
def test_a_killed_conversion_leaves_no_beton_and_can_be_run_again(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", per_class=100)
    beton = tmp_path / "out" / "x.beton"
    convert = (
        "import sys; from pipeline.data import convert_image_folder as convert; "
        "convert(sys.argv[1], sys.argv[2], storage='compact', workers=1)"
    )
    process = subprocess.Popen([sys.executable, "-c", convert, tmp_path / "photos", beton])
    partial = beton.with_name("x.beton.partial")
    while not partial.exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not beton.exists()
    convert_image_folder(tmp_path / "photos", beton, workers=2)
    assert {path.name for path in beton.parent.iterdir()} == {"x.beton", "x.beton.manifest.csv"}
    assert verify_beton(beton) == 300


# --- folders -------------------------------------------------------------------------------------


def test_a_wrong_number_of_classes_is_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="photos: 3 classes found, 4 expected"):
        convert_image_folder(photos, tmp_path / "x.beton", workers=1, num_classes=4)


def test_the_missing_and_the_extra_class_are_named(photos: Path) -> None:
    expected = ("n00000000", "n00000001", "n00000009")
    with pytest.raises(UserError, match="missing: n00000009; not expected: n00000002"):
        list_image_folder(photos, classes=expected)


def test_folders_that_cannot_be_right_are_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not there"):
        list_image_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no class folders"):
        list_image_folder(tmp_path / "empty")
    (photos / "n00000003").mkdir()
    with pytest.raises(UserError, match="n00000003 holds no images"):
        list_image_folder(photos)
    (photos / "n00000003" / "labels.txt").write_text("3")
    with pytest.raises(UserError, match=r"n00000003/labels\.txt is not a file with an image's"):
        list_image_folder(photos)


def test_hidden_files_and_files_beside_the_classes_do_not_count(photos: Path) -> None:
    before = list_image_folder(photos)
    (photos / "n00000000.tar").write_bytes(b"")
    (photos / "n00000000" / "._n00000000_0.JPEG").write_bytes(b"")
    (photos / ".ipynb_checkpoints").mkdir()
    assert list(list_image_folder(photos).names) == list(before.names)


def test_the_listing_says_what_is_in_the_folder(photos: Path, tmp_path: Path) -> None:
    write_listing(tmp_path / "listings" / "train.csv", list_image_folder(photos))
    header, first, *rest = (tmp_path / "listings" / "train.csv").read_text().splitlines()
    size = (photos / "n00000000" / "n00000000_0.JPEG").stat().st_size
    assert header == "path,label,bytes"
    assert first == f"n00000000/n00000000_0.JPEG,0,{size}"
    assert len(rest) == 17


# --- betons that are not what they should be -----------------------------------------------------


def test_a_beton_cut_short_is_refused(beton: Path) -> None:
    data = beton.read_bytes()
    for length in (len(data) - 1, len(data) // 2, 1000, 10, 0):
        beton.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"photos\.beton is cut short .*convert_imagenet"):
            open_beton(beton)
    beton.write_bytes(data + b"\0")
    with pytest.raises(UserError, match="1 bytes too many"):
        open_beton(beton)


def test_what_is_no_beton_is_refused(beton: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.beton is not there: run dvc repro"):
        open_beton(tmp_path / "none.beton")
    with pytest.raises(UserError, match="is not an FFCV file"):
        open_beton(next(photos.rglob("*.JPEG")))
    with pytest.raises(UserError, match="has the fields image, label; image, mask are needed"):
        open_beton(beton, fields=("image", "mask"))


def test_verification_finds_any_change(beton: Path) -> None:
    assert verify_beton(beton) == 18
    good = beton.read_bytes()
    reader = Reader(str(beton))
    middle = int(reader.alloc_table[7]["ptr"]) + 500
    label_of_3 = HeaderType.itemsize + reader.field_descriptors.nbytes + 3 * 24 + 16
    for position, name in ((middle, "7 "), (label_of_3, "3 ")):
        changed = bytearray(good)
        changed[position] ^= 1
        beton.write_bytes(changed)
        with pytest.raises(UserError, match=f"1 of 18 samples are not .*, {name}.*n0000"):
            verify_beton(beton)


def test_verification_wants_the_right_manifest(beton: Path) -> None:
    manifest = paths.manifest(beton)
    lines = manifest.read_text().splitlines(keepends=True)
    for wrong, message in (
        (lines[:-1], "does not have one row for each of the 18 samples"),
        ([*lines, lines[-1].replace("17,", "18,", 1)], "one row for each of the 18 samples"),
        ([*lines[:5], *lines[6:], lines[5]], "is damaged in line 6"),
        ([*lines[:5], "4,path\n"], "is damaged in line 6"),
        (lines[1:], "is not a manifest"),
    ):
        manifest.write_text("".join(wrong))
        with pytest.raises(UserError, match=message):
            verify_beton(beton)
    manifest.unlink()
    with pytest.raises(UserError, match=r"manifest\.csv is not there"):
        verify_beton(beton)


def test_a_beton_that_its_writer_did_not_finish_is_refused(beton: Path) -> None:
    data = bytearray(beton.read_bytes())
    offset = HeaderType.fields["alloc_table_ptr"][1]
    struct.pack_into("<Q", data, offset, 0)
    beton.write_bytes(data)
    with pytest.raises(UserError, match="is cut short"):
        open_beton(beton)
