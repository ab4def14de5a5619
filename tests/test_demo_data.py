"""The demo's two data sets: ImageNet's and ADE20K's layouts, made of scikit-learn's digits."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.demo import CLASSES, draw_scene, load_digits, write_digits, write_scenes
from pipeline.data.folders import class_names, list_image_folder
from pipeline.data.segmentation_files import files_at, list_segmentation_images
from pipeline.errors import UserError


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "digits"
    write_digits(folder)
    return folder


def test_digits_have_imagenets_layout(digits_folder: Path) -> None:
    train = list_image_folder(digits_folder / "train", num_classes=10)
    val = list_image_folder(digits_folder / "val", classes=class_names(digits_folder / "train"))
    assert (len(train), len(val)) == (1438, 359)
    assert val.classes == tuple(f"digit_{digit}" for digit in range(10))
    share = np.bincount(val.labels) / (np.bincount(val.labels) + np.bincount(train.labels))
    assert np.abs(share - 0.2).max() < 0.005


def test_digits_are_scikit_learns_images(digits_folder: Path) -> None:
    digits = load_digits()
    for path in (digits_folder / "train").rglob("*5.JPEG"):
        image = Image.open(path)
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 32))
        small = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX), float)
        ink = digits.ink[int(path.stem)].astype(float)
        assert np.corrcoef(small.ravel(), ink.ravel())[0, 1] > 0.95
        assert path.parent.name == f"digit_{digits.labels[int(path.stem)]}"


def test_no_digit_is_in_both_parts_and_the_later_handwriting_is_held_out(
    digits_folder: Path,
) -> None:
    numbers = {
        split: [int(path.stem) for path in (digits_folder / split).rglob("*.JPEG")] for split in ("train", "val")
    }
    assert sorted(numbers["train"] + numbers["val"]) == list(range(1797))
    labels = load_digits().labels
    for digit in range(10):
        last = max(n for n in numbers["train"] if labels[n] == digit)
        assert all(n > last for n in numbers["val"] if labels[n] == digit)


def test_the_same_digits_are_written_again(digits_folder: Path, tmp_path: Path) -> None:
    write_digits(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(digits_folder)


def test_a_folder_made_here_is_replaced_and_any_other_refused(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", train_images=2, val_images=1)
    write_scenes(tmp_path / "scenes", train_images=1, val_images=1)
    assert len(list_segmentation_images(files_at(tmp_path / "scenes"), "training")) == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(UserError, match="mine exists and was not made by this pipeline"):
        write_digits(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "irreplaceable"
    assert {path.name for path in tmp_path.iterdir()} == {"scenes", "mine"}


def test_a_failure_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="digits cannot be written: No space left on device"):
        write_digits(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


def test_scenes_have_ade20ks_layout(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", train_images=60, val_images=60, image_size_px=96)
    assert len(CLASSES) == 11
    for split, count in (("training", 60), ("validation", 60)):
        root = tmp_path / "scenes"
        pairs = list_segmentation_images(files_at(root), split)
        assert len(pairs) == count
        seen = np.zeros(256, int)
        for index in range(count):
            image = Image.open(root / pairs.relative_path(index))
            mask = Image.open(root / pairs.label(index))
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (96, 96))
            assert (mask.format, mask.mode, mask.size) == ("PNG", "L", (96, 96))
            labels = np.bincount(np.asarray(mask).ravel(), minlength=256)
            assert labels[1] > labels[2:].sum() > 200
            seen += labels
        assert seen[12:].sum() == 0
        assert seen[:12].all()


def test_a_scene_depends_on_its_index_and_seed_alone(tmp_path: Path) -> None:
    write_scenes(tmp_path / "few", train_images=2, val_images=1)
    write_scenes(tmp_path / "more", train_images=4, val_images=2)
    write_scenes(tmp_path / "other", train_images=2, val_images=1, seed=1)
    few, more, other = (contents(tmp_path / name) for name in ("few", "more", "other"))
    assert few.items() <= more.items()
    assert few.keys() == other.keys()
    assert all(few[name] != other[name] for name in few if name.endswith((".jpg", ".png")))


def test_each_split_is_drawn_from_its_own_handwriting() -> None:
    digits = load_digits()
    only = {
        split: replace(digits, ink=digits.ink * (digits.held_out == held_out)[:, None, None])
        for split, held_out in (("training", False), ("validation", True))
    }
    for split, own in only.items():
        other = only["training" if split == "validation" else "validation"]
        for index in range(5):
            image, mask = draw_scene(digits, split, index, 128, 0)
            own_image, own_mask = draw_scene(own, split, index, 128, 0)
            assert np.array_equal(image, own_image)
            assert np.array_equal(mask, own_mask)
            assert (draw_scene(other, split, index, 128, 0)[1] == 1).all()
