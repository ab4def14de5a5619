"""ImageNet as people have it: the same .beton from folders, tar files and parquet files, and what is refused."""

import csv
import gzip
import io
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.io import savemat
from sklearn.datasets import load_sample_image

from pipeline import paths
from pipeline.config import Ade20kData, ImageNetData
from pipeline.data import convert_segmentation_folder
from pipeline.data.convert import convert_images
from pipeline.data.folders import write_listing
from pipeline.data.imagenet import check, list_imagenet
from pipeline.data.imagenet_labels import KAGGLE, KIT, LINES
from pipeline.data.manifest import verify_beton
from pipeline.data.segmentation_files import check as check_ade20k
from pipeline.errors import UserError

SYNSETS = ("n01440764", "n01443537", "n01484850")
NUMBERS = {"n01440764": 2, "n01443537": 3, "n01484850": 1}
"""ILSVRC2012_ID: not in the order of the synsets, as in the real kit."""
CLASS_OF_VAL = (2, 0, 0, 1, 2, 1, 0)
"""Of ILSVRC2012_val_00000001.JPEG and so on."""
PHOTO = Image.fromarray(load_sample_image("china.jpg"))


def photo(number: int) -> bytes:
    """A JPEG, now and then a large one, a CMYK JPEG or a PNG; these last are stored as pixels."""
    random = np.random.default_rng(number)
    left, top = random.integers((340, 227))
    crop = PHOTO.crop((left, top, left + int(random.integers(60, 300)), top + int(random.integers(60, 200))))
    file = io.BytesIO()
    if number % 10 == 1:
        crop = PHOTO
    if number % 10 == 4:
        crop.save(file, "PNG")
    else:
        (crop.convert("CMYK") if number % 10 == 9 else crop).save(file, "JPEG", quality=90)
    return file.getvalue()


def val_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


@pytest.fixture(scope="module")
def images() -> dict[str, dict[tuple[str, str], bytes]]:
    """By split, (synset, file name)."""
    train = {
        (synset, f"{synset}_{n * 7 % 40}.JPEG"): photo(10 * k + n) for k, synset in enumerate(SYNSETS) for n in range(8)
    }
    val = {(SYNSETS[k], val_name(number)): photo(100 + number) for number, k in enumerate(CLASS_OF_VAL, 1)}
    return {"train": train, "val": val}


Images = dict[str, dict[tuple[str, str], bytes]]


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def write_kit(root: Path) -> None:
    """The development kit: classes with their numbers among inner nodes of the hierarchy, and the truth by number."""
    kind = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "f8")]
    rows = [(number, synset, "a word", "a gloss", 0) for synset, number in NUMBERS.items()]
    inner = [(4, "n00001740", "entity", "that which is", 3)]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows + inner, dtype=kind)[:, None]})
    truth = "".join(f"{NUMBERS[SYNSETS[k]]}\n" for k in CLASS_OF_VAL)
    with tarfile.open(root / f"{KIT}.tar.gz", "w:gz") as archive:
        add(archive, f"{KIT}/data/meta.mat", meta.getvalue())
        add(archive, f"{KIT}/data/ILSVRC2012_validation_ground_truth.txt", truth.encode())


def write_folder(root: Path, images: Images) -> None:
    for split, files in images.items():
        for (synset, name), data in files.items():
            put(root / split / synset / name, data)


def write_flat(root: Path, images: Images) -> None:
    write_folder(root, {"train": images["train"]})
    for (_, name), data in images["val"].items():
        put(root / "val" / name, data)


def write_flat_with_kit(root: Path, images: Images) -> None:
    write_flat(root, images)
    write_kit(root)


def write_flat_with_unpacked_kit(root: Path, images: Images) -> None:
    write_flat_with_kit(root, images)
    with tarfile.open(root / f"{KIT}.tar.gz") as archive:
        archive.extractall(root, filter="data")
    (root / f"{KIT}.tar.gz").unlink()


def write_flat_with_kaggles_list(root: Path, images: Images) -> None:
    write_flat(root, images)
    with (root / KAGGLE).open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("ImageId", "PredictionString"))
        for (synset, name), _ in reversed(images["val"].items()):
            rows.writerow((name.removesuffix(".JPEG"), f"{synset} 1 2 30 40 {synset} 5 6 7 8 "))


def write_flat_with_lines(root: Path, images: Images) -> None:
    write_flat(root, images)
    (root / LINES).write_text("".join(f"{name} {synset}\n" for synset, name in images["val"]))


def write_tars(root: Path, images: Images) -> None:
    """As published: a tar file of a tar file for each class, neither in sorted order; a flat one; the kit."""
    root.mkdir(parents=True)
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for synset in (SYNSETS[1], SYNSETS[2], SYNSETS[0]):
            inner_bytes = io.BytesIO()
            with tarfile.open(fileobj=inner_bytes, mode="w") as inner:
                for (of, name), data in images["train"].items():
                    if of == synset:
                        add(inner, name, data)
            add(outer, f"{synset}.tar", inner_bytes.getvalue())
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as flat:
        for (_, name), data in images["val"].items():
            add(flat, name, data)
    write_kit(root)


def write_own_tars(root: Path, images: Images) -> None:
    """What people make of the folders."""
    write_folder(root / "unpacked", images)
    for split in images:
        with tarfile.open(root / f"{split}.tar", "w") as archive:
            archive.add(root / "unpacked" / split, arcname=split)
    shutil.rmtree(root / "unpacked")


def write_shards(root: Path, images: Images, *, with_paths: bool = True) -> None:
    """As on the Hub: in random order, several row groups per shard, the synset behind each file name."""
    for split, shards in (("train", 3), ("validation", 1), ("test", 1)):
        files = list(images[{"validation": "val"}.get(split, "train")].items())
        order = np.random.default_rng(0).permutation(len(files))
        for shard in range(shards):
            rows = [files[position] for position in order[shard::shards]]
            of_hub = [
                {"bytes": data, "path": f"{name.removesuffix('.JPEG')}_{synset}.JPEG" if with_paths else None}
                for (synset, name), data in rows
            ]
            labels = [-1 if split == "test" else SYNSETS.index(synset) for (synset, _), _ in rows]
            kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            table = pa.table({"image": pa.array(of_hub, kind), "label": pa.array(labels, pa.int64())})
            path = root / "data" / f"{split}-{shard:05d}-of-{shards:05d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, path, row_group_size=3)


FORMS: dict[str, tuple[str, Callable[[Path, Images], None]]] = {
    "a flat val and the kit": ("folder", write_flat_with_kit),
    "a flat val and the unpacked kit": ("folder", write_flat_with_unpacked_kit),
    "a flat val and Kaggle's list": ("folder", write_flat_with_kaggles_list),
    "a flat val and lines": ("folder", write_flat_with_lines),
    "the published tar files": ("tar", write_tars),
    "tar files of class folders": ("tar", write_own_tars),
    "the Hub's shards": ("parquet", write_shards),
}


def section(source: str, root: Path, **changed: Any) -> ImageNetData:
    return ImageNetData.model_validate(
        {
            "source": source,
            "root": str(root),
            "splits": ["train", "val"],
            "num_classes": 3,
            "storage": "original",
            **changed,
        }
    )


def converted(source: str, root: Path, out: Path, storage: Any = "original", workers: int = 2) -> dict[str, bytes]:
    """The content of every .beton, manifest and listing."""
    found, classes = {}, None
    for split in ("train", "val"):
        listed = list_imagenet(source, root, split, num_classes=3, synsets=SYNSETS, classes=classes)
        classes = listed.classes
        beton = out / f"{split}.beton"
        convert_images(listed, beton, storage=storage, workers=workers)
        verify_beton(beton)
        write_listing(out / f"{split}.csv", listed)
        found |= {path.name: path.read_bytes() for path in (beton, paths.manifest(beton), out / f"{split}.csv")}
    return found


@pytest.fixture(scope="module")
def expected(images: Images, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """From class folders, by storage."""
    root = tmp_path_factory.mktemp("folder")
    write_folder(root, images)
    return {storage: converted("folder", root, root / storage, storage) for storage in ("original", "compact")}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_bytes(
    form: str, images: Images, expected: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    source, write = FORMS[form]
    write(tmp_path / "root", images)
    check(section(source, tmp_path / "root"))
    found = converted(source, tmp_path / "root", tmp_path / "out")
    assert {name: found[name] == content for name, content in expected["original"].items()} == dict.fromkeys(
        found, True
    )


@pytest.mark.parametrize("form", ["the published tar files", "the Hub's shards"])
def test_compact_files_are_the_same_too(
    form: str, images: Images, expected: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    source, write = FORMS[form]
    write(tmp_path / "root", images)
    found = converted(source, tmp_path / "root", tmp_path / "out", "compact", workers=1)
    assert found == expected["compact"]
    assert found["train.beton"] != expected["original"]["train.beton"]


def test_shards_without_paths_have_the_classes_of_their_labels(images: Images, tmp_path: Path) -> None:
    write_shards(tmp_path, images, with_paths=False)
    listed = list_imagenet("parquet", tmp_path, "val", num_classes=3, synsets=SYNSETS, classes=None)
    assert listed.classes == SYNSETS
    assert np.bincount(listed.labels).tolist() == np.bincount(CLASS_OF_VAL).tolist()
    assert listed.names[0].startswith("val_0")


def test_a_flat_val_without_labels_is_refused_with_what_to_do(images: Images, tmp_path: Path) -> None:
    write_flat(tmp_path, images)
    for refuse in (lambda: converted("folder", tmp_path, tmp_path / "out"), lambda: check(section("folder", tmp_path))):
        with pytest.raises(UserError, match=rf"{KIT}\.tar\.gz.*{KAGGLE}.*{LINES}"):
            refuse()


def test_the_numbers_of_the_kit_are_not_taken_for_labels(images: Images, tmp_path: Path) -> None:
    write_flat_with_kit(tmp_path, images)
    listed = list_imagenet("folder", tmp_path, "val", num_classes=3, synsets=SYNSETS, classes=None)
    by_name = dict(zip(listed.names, listed.labels.tolist(), strict=True))
    assert [by_name[val_name(number)] for number in range(1, 8)] == list(CLASS_OF_VAL)


def _drop_val_image(root: Path) -> None:
    (root / "val" / val_name(3)).unlink()


def _strange_class(root: Path) -> None:
    (root / LINES).write_text(f"{val_name(1)} goldfish\n")


def _cut(name: str, kept: float) -> Callable[[Path], None]:
    def cut(root: Path) -> None:
        data = (root / name).read_bytes()
        (root / name).write_bytes(data[: int(len(data) * kept)])

    return cut


def _compress(root: Path) -> None:
    path = root / "ILSVRC2012_img_train.tar"
    path.write_bytes(gzip.compress(path.read_bytes()))


def _rename_shard(root: Path) -> None:
    (root / "data/train-00001-of-00003.parquet").rename(root / "data/elsewhere.parquet")


def _other_label(root: Path) -> None:
    path = root / "data/validation-00000-of-00001.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(1, "label", pa.array([0] * len(table), pa.int64())), path)


def _other_columns(root: Path) -> None:
    pq.write_table(pa.table({"png": [b"x"]}), root / "data/validation-00000-of-00001.parquet")


BAD: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a validation image is missing": ("a flat val and the kit", _drop_val_image, "6 images, the labels are for 7"),
    "a class that is no synset": ("a flat val and lines", _strange_class, "'goldfish'.* is no synset"),
    "a kit cut short": ("a flat val and the kit", _cut(f"{KIT}.tar.gz", 0.5), "development kit"),
    "training tar cut short": (
        "the published tar files",
        _cut("ILSVRC2012_img_train.tar", 0.5),
        "fetch it again|cannot",
    ),
    "validation tar cut short": (
        "the published tar files",
        _cut("ILSVRC2012_img_val.tar", 0.5),
        "fetch it again|labels",
    ),
    "a compressed tar": ("the published tar files", _compress, "gunzip"),
    "no kit beside the tar": ("the published tar files", lambda root: (root / f"{KIT}.tar.gz").unlink(), KAGGLE),
    "a shard is missing": ("the Hub's shards", _rename_shard, "train-00001-of-00003.parquet is missing"),
    "a shard cut short": ("the Hub's shards", _cut("data/train-00002-of-00003.parquet", 0.7), "fetch it again"),
    "labels against paths": ("the Hub's shards", _other_label, "has the label 0, which is"),
    "another data set's shards": ("the Hub's shards", _other_columns, "not a shard of ILSVRC/imagenet-1k"),
}


@pytest.mark.parametrize("fault", BAD)
def test_what_is_not_whole_is_refused_and_nothing_is_left(fault: str, images: Images, tmp_path: Path) -> None:
    form, spoil, message = BAD[fault]
    source, write = FORMS[form]
    write(tmp_path / "root", images)
    spoil(tmp_path / "root")
    with pytest.raises(UserError, match=message):
        converted(source, tmp_path / "root", tmp_path / "out")
    left = {path.name for path in (tmp_path / "out").glob("*")} if (tmp_path / "out").exists() else set()
    assert "val.beton" not in left
    assert not any(name.endswith(".partial") for name in left)


def test_a_damaged_image_in_an_archive_is_named(images: Images, tmp_path: Path) -> None:
    broken = {split: dict(files) for split, files in images.items()}
    first = next(iter(broken["val"]))
    broken["val"][first] = b"not an image"
    for form in ("the published tar files", "the Hub's shards"):
        source, write = FORMS[form]
        root = tmp_path / source
        write(root, broken)
        with pytest.raises(UserError, match=rf"{first[0]}/{first[1]} in .* is not an image"):
            converted(source, root, tmp_path / "out")


def test_ade20k_is_read_from_its_zip_file(tmp_path: Path) -> None:
    folder = tmp_path / "ADEChallengeData2016"
    for number in range(5):
        crop = PHOTO.crop((number, 0, 90 + number, 70))
        for split in ("training", "validation"):
            image = folder / f"images/{split}/ADE_{number}.jpg"
            mask = folder / f"annotations/{split}/ADE_{number}.png"
            for path in (image, mask):
                path.parent.mkdir(parents=True, exist_ok=True)
            crop.save(image, quality=90)
            Image.fromarray(np.full((70, 90), number, np.uint8)).save(mask)
    archive = tmp_path / "ADEChallengeData2016.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.rglob("*"), reverse=True):
            file.write(path, path.relative_to(tmp_path))
    outputs = []
    for root in (folder, archive):
        beton = tmp_path / f"{root.name}.beton"
        convert_segmentation_folder(root, "training", beton, workers=2, num_classes=7)
        outputs.append((beton.read_bytes(), paths.manifest(beton).read_bytes()))
        check_ade20k(Ade20kData(source="folder", root=str(root), splits=["training", "validation"], num_classes=7))
    assert outputs[0] == outputs[1]

    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a whole zip file"):
        convert_segmentation_folder(archive, "training", tmp_path / "x.beton", workers=1, num_classes=7)
    with pytest.raises(UserError, match="images/training is missing"):
        check_ade20k(Ade20kData(source="folder", root=str(tmp_path), splits=["training"], num_classes=7))


def test_what_is_missing_is_named_by_the_check(tmp_path: Path) -> None:
    for source, message in (
        ("folder", "train is missing"),
        ("tar", r"ILSVRC2012_img_train\.tar is missing"),
        ("parquet", "has no train-00000-of"),
    ):
        with pytest.raises(UserError, match=message):
            check(section(source, tmp_path))


def test_stages_read_archives_and_leave_no_file_unpacked(
    images: Images, expected: dict[str, dict[str, bytes]], in_checkout: Path
) -> None:
    from pipeline.tasks.classification.images import convert, prepare

    for form in ("the published tar files", "the Hub's shards"):
        source, write = FORMS[form]
        root = in_checkout / "data" / source
        write(root, images)
        before = sorted(root.rglob("*"))
        prepare(section(source, root))
        convert(section(source, root), workers=2)
        assert sorted(root.rglob("*")) == before
        for split in ("train", "val"):
            assert paths.listing("imagenet", split).read_bytes() == expected["original"][f"{split}.csv"]
            assert paths.beton("imagenet", split).read_bytes() == expected["original"][f"{split}.beton"]
