"""One's own images: their parameters, what is said of them, the weights that a training starts from, and the page."""

import io
import json
import re
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, Checkout
from PIL import Image
from released_format import authors_state

from pipeline import doctor, paths
from pipeline.__main__ import main
from pipeline.catalogue import DATA_SETS
from pipeline.config import Params, load_params
from pipeline.data.demo import load_digits
from pipeline.errors import UserError
from pipeline.experiments import compose
from pipeline.launch.fingerprint import identify
from pipeline.launch.works import training
from pipeline.models.poolformer import create_classifier
from pipeline.models.released_weights import RELEASED_CLASSIFIERS, load_start
from pipeline.report.collect import recipe_differences_of
from pipeline.stages import prepare, prepare_weights
from pipeline.tasks.classification.description import CLASSIFIER
from pipeline.tasks.segmentation.description import SEGMENTER

PAGE = ROOT / "docs/your_images.md"
NAMES = ("a cat's photo", "Zürich 7", "x_1")
RELEASED = "poolformer_s12.pth.tar"


def write_photos(root: Path, split: str, counts: tuple[int, ...], size: tuple[int, int] = (48, 40)) -> None:
    """Digits as photographs, a class each, in two formats."""
    digits = load_digits()
    for digit, (name, count) in enumerate(zip(NAMES, counts, strict=False)):
        folder = root / split / name
        folder.mkdir(parents=True)
        for number, index in enumerate(np.flatnonzero(digits.labels == digit)[:count]):
            image = Image.fromarray(digits.ink[index]).resize(size)
            image.save(folder / f"IMG {number}.{('jpg', 'png')[number % 2]}")


def write_scenes(root: Path, images: int = 4, labels: tuple[int, ...] = (0, 1, 2)) -> None:
    random = np.random.default_rng(0)
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for number in range(images):
            mask = random.choice(np.array(labels, np.uint8), (6, 8))
            Image.fromarray(mask * 60).resize((80, 60)).convert("RGB").save(root / f"images/{split}/{number}.jpg")
            Image.fromarray(mask).resize((80, 60), 0).save(root / f"annotations/{split}/{number}.png")


def composed(*overrides: str) -> Params:
    compose([*overrides])
    return load_params(paths.PARAMS)


def said_of(params: Params, name: str, caplog: pytest.LogCaptureFixture) -> str:
    caplog.clear()
    prepare.run(params, DATA_SETS[name])
    return caplog.text


# --- what is said of the images ----------------------------------------------------------------------


def test_the_number_of_classes_is_counted_for_the_user(in_checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_photos(Path("photos"), "train", (9, 9, 9))
    params = composed("scale=mine", "imagenet.root=photos")
    assert main(["prepare_imagenet"]) == 1
    assert "has 3 class folders (Zürich 7 to x_1)" in (told := capsys.readouterr().err)
    assert "compose again with imagenet.num_classes=3" in told
    (fault,) = [found for found in doctor._survey(params) if found.level == "fault"]
    assert "imagenet.num_classes=3" in fault.text


def test_what_is_odd_about_images_is_said_and_no_more(in_checkout: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_photos(Path("photos"), "train", (150, 3, 12), size=(400, 100))
    write_photos(Path("photos"), "val", (30, 1, 4))
    own = ("scale=mine", "imagenet.root=photos", "imagenet.num_classes=3")
    said = said_of(composed(*own), "imagenet", caplog)
    for sentence in (
        "classes with fewer than 20 training images: 2 of 3: Zürich 7 (3), x_1 (12)",
        "unbalanced classes, from a cat's photo (150) to Zürich 7 (3) training images",
        "an epoch has 2 optimiser steps: 165 images in batches of 64",
        "100% of 165 training images looked at are smaller than the training crop of 224 px",
        "(the median short side is 100)",
        "classification.recipe.image_size=96",
        "100% of 165 training images looked at are more than 3 times as long as wide",
        "val has 35 images: one is 2.9 points of top-1",
    ):
        assert sentence in said
        assert any(sentence in finding.text for finding in doctor._survey(load_params(paths.PARAMS)))
    shutil.rmtree("photos")
    write_photos(Path("photos"), "train", (100, 70, 90), size=(300, 230))
    write_photos(Path("photos"), "val", (60, 60, 60))
    assert said_of(composed(*own, "classification.recipe.global_batch_size=16"), "imagenet", caplog) == ""


def test_more_than_all_images_in_a_batch_is_refused_early(in_checkout: Path) -> None:
    write_photos(Path("photos"), "train", (20, 20, 20))
    write_photos(Path("photos"), "val", (1, 1, 1))
    params = composed("scale=mine", "imagenet.root=photos", "imagenet.num_classes=3")
    advice = r"60 training images are fewer than one global batch of 64: compose \S+\.global_batch_size=8"
    with pytest.raises(UserError, match=advice):
        prepare.run(params, DATA_SETS["imagenet"])
    assert [found.level for found in doctor._survey(params)] == ["fault"]
    with pytest.raises(UserError, match=advice):
        CLASSIFIER.refuse_no_steps(params, "poolformer_s12", 60)
    CLASSIFIER.refuse_no_steps(params, "poolformer_s12", 64)


def test_what_is_odd_about_masks_is_said(in_checkout: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_scenes(Path("scenes"), labels=(0, 0, 0, 1, 3))
    own = ("scale=my_masks", "ade20k.root=scenes")
    with pytest.raises(UserError, match=r"has label 3, and ade20k.num_classes is 2: .*ade20k.num_classes=3"):
        prepare.run(composed(*own), DATA_SETS["ade20k"])
    said = said_of(composed(*own, "ade20k.num_classes=5"), "ade20k", caplog)
    assert "labels 2, 4, 5 are in none of the 4 masks looked at; if 3 is the last class: ade20k.num_classes=3" in said
    assert re.search(r"\d\d% of all pixels have label 0", said)
    shutil.rmtree("scenes")
    write_scenes(Path("scenes"))
    assert said_of(composed(*own), "ade20k", caplog) == ""
    Image.fromarray(np.full((60, 80), 255, np.uint8)).save("scenes/annotations/training/0.png")
    with pytest.raises(UserError, match="write 0 in place of 255"):
        prepare.run(load_params(paths.PARAMS), DATA_SETS["ade20k"])


def test_the_listing_of_other_images_is_not_taken_for_these(
    in_checkout: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_photos(Path("photos"), "train", (30, 2))
    write_photos(Path("photos"), "val", (2, 2))
    batch = "classification.recipe.global_batch_size=8"
    said_of(composed("scale=mine", "imagenet.root=photos", batch), "imagenet", caplog)
    write_photos(Path("others"), "train", (3, 3, 3))
    params = composed("scale=mine", "imagenet.root=others", "imagenet.num_classes=3", batch)
    (note,) = doctor._survey(params)
    assert "not listed yet: `dvc repro prepare_imagenet`" in note.text


# --- the weights that a training starts from ---------------------------------------------------------


@pytest.fixture
def manifest(in_checkout: Path) -> Path:
    """A converted data set's, in a checkout with S12's released file."""
    torch.save(authors_state("poolformer_s12"), f"released/{RELEASED}")
    manifest = paths.manifest(CLASSIFIER.data.beton("train"))
    manifest.parent.mkdir(parents=True)
    manifest.write_text("path\n" + "image\n" * 500)
    return manifest


def test_all_is_loaded_but_a_head_of_other_classes(tmp_path: Path) -> None:
    state = authors_state("poolformer_s12")
    torch.save(state, tmp_path / RELEASED)
    model = create_classifier("poolformer_s12", 3)
    head = model.head["fc"].weight.clone()
    assert load_start(model, tmp_path / RELEASED) == 1000
    assert torch.equal(model.head["fc"].weight, head), "as it was initialised"
    assert torch.equal(model.head["norm"].weight, state["norm.weight"])
    assert torch.equal(model.stages[3].blocks[1].mlp.fc2.weight, state["network.6.1.mlp.fc2.weight"])
    torch.save({"model": model.state_dict()}, tmp_path / "mine.pt")
    again = create_classifier("poolformer_s12", 3)
    assert load_start(again, tmp_path / "mine.pt") == 3
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_file_that_does_not_fit_is_refused_before_a_job_is_queued(manifest: Path) -> None:
    state = authors_state("poolformer_s12")
    for name, content, says in (
        ("s24.pt", authors_state("poolformer_s24"), "holds poolformer_s24, and the model is poolformer_s12"),
        ("less.pt", {key: value for key, value in state.items() if key != "norm.bias"}, r"missing \(norm.bias\)"),
        ("headless.pt", {key: state[key] for key in state if not key.startswith("head")}, "head.weight"),
        ("more.pt", state | {"more": torch.zeros(1)}, r"left over \(more\)"),
    ):
        torch.save(content, f"released/{name}")
        with pytest.raises(UserError, match=says):
            prepare_weights.run(composed("scale=mine", f"classification.start={name}"))
    params = composed("scale=mine", "classification.start=nowhere.pt")
    with pytest.raises(UserError, match=r"released/nowhere\.pt: no such file"):
        prepare_weights.run(params)
    (fault,) = doctor._start(params)
    assert (fault.level, "released/nowhere.pt, which is missing" in fault.text) == ("fault", True)
    (fault,) = doctor._start(composed("scale=my_masks"))
    assert (fault.level, "backbones/poolformer_s12-0.pt" in fault.text) == ("fault", True)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("start=/tmp/a.pt", "give its name alone"),
        ("weights=released", "drop one"),
        ("start=[a]", "valid string"),
    ],
)
def test_a_start_that_cannot_be_is_one_clear_line(override: str, says: str, in_checkout: Path) -> None:
    with pytest.raises(UserError, match=says):
        compose(["scale=mine", f"classification.{override}"])


def test_another_file_is_another_training_and_makes_it_stale(manifest: Path) -> None:
    found = {}
    for name, start in (("none", "null"), ("released", "released"), ("other", "released"), ("named", "copy.pt")):
        if name == "other":
            shutil.copy(f"released/{RELEASED}", "released/copy.pt")
            state = authors_state("poolformer_s12")
            torch.save(state | {"norm.bias": state["norm.bias"] + 1}, f"released/{RELEASED}")
        params = composed("scale=mine", f"classification.start={start}")
        work = training(params, CLASSIFIER, "poolformer_s12", 0)
        assert work is not None
        prepare_weights.run(params)
        found[name] = (identify(work).fingerprint, paths.start("classifier", "poolformer_s12").read_text())
        assert ("classification.start" in recipe_differences_of(params)["poolformer_s12"]) == (start != "null")
    assert len({fingerprint for fingerprint, _ in found.values()}) == 4
    assert len({dependency for _, dependency in found.values()}) == 4
    assert found["none"][1] == "{}\n"


def test_without_a_start_a_trainings_code_is_what_it_was(manifest: Path) -> None:
    work = training(composed("scale=mine", "classification.start=null"), CLASSIFIER, "poolformer_s12", 0)
    assert work is not None
    assert "start" not in work.arguments
    assert not [place for place in identify(work).definitions if "fine_tuning" in place or "load_start" in place]


def test_the_authors_file_has_the_name_that_a_start_has(in_checkout: Path) -> None:
    params = composed("scale=mine")
    for variant, name in RELEASED_CLASSIFIERS.items():
        assert CLASSIFIER.start(params, variant) == Path("released") / name


def test_a_segmenter_starts_from_a_classifier_of_another_folder(manifest: Path) -> None:
    masks = paths.manifest(SEGMENTER.data.beton("training"))
    masks.parent.mkdir(parents=True)
    masks.write_text("path\n" + "image\n" * 20)
    Path("backbones").mkdir()
    shutil.copy(f"released/{RELEASED}", "backbones/poolformer_s12-0.pt")
    params = composed("scale=my_masks")
    work = training(params, SEGMENTER, "poolformer_s12", 0)
    assert work is not None
    assert (work.after, work.inputs[1]) == (None, Path("backbones/poolformer_s12-0.pt"))
    assert "segmentation.backbones" in recipe_differences_of(params)["poolformer_s12"]
    own = training(
        composed(
            "scale=mine",
            "segmentation.train=[poolformer_s12]",
            "ade20k.splits=[training,validation]",
            "imagenet.num_classes=3",
        ),
        SEGMENTER,
        "poolformer_s12",
        0,
    )
    assert own is not None
    assert own.after is not None
    assert own.after.work.arguments["start"] == f"released/{RELEASED}"


# --- the page ----------------------------------------------------------------------------------------

QUICK = (
    "classification.recipe.max_steps=2",
    "classification.recipe.global_batch_size=16",
    "classification.recipe.image_size=32",
    "segmentation.recipe.max_steps=1",
    "segmentation.recipe.global_batch_size=2",
    "segmentation.recipe.crop_size=64",
    "segmentation.recipe.scale=[64,64]",
    "evaluation.segmentation.scale=[64,64]",
)


def follow(page: Path, checkout: Checkout) -> list[str]:
    """Run every block of the page, in order; `compose` with fewer and smaller steps. What each printed."""
    said = []
    for language, block in re.findall(r"```(bash|python)\n(.*?)```", page.read_text(), re.DOTALL):
        if language == "python":
            with redirect_stdout(io.StringIO()) as printed:  # here, where torch is imported already
                exec(block.replace("create_transform(224", "create_transform(32"), {})
            said.append(printed.getvalue())
            continue
        for line in block.splitlines():
            quick = QUICK if "compose" in line else ()
            said.append(checkout.run("bash", "-c", " ".join([line, *(f"'{word}'" for word in quick)])).stdout)
    return said


@pytest.mark.slow
def test_the_page_leads_from_a_folder_to_tables_and_models(checkout: Checkout, in_checkout: Path) -> None:
    folder = checkout.folder
    write_photos(folder / "photos", "train", (30, 30, 30))
    write_scenes(folder / "scenes")
    torch.save(authors_state("poolformer_s12"), folder / f"released/{RELEASED}")
    shutil.copy(folder / "photos/train/x_1/IMG 0.jpg", folder / "any.jpg")
    said = follow(PAGE, checkout)
    assert len(said) == 13
    split = {kind: len(list((folder / "photos" / kind).glob("*/*"))) for kind in ("train", "val")}
    assert split == {"train": 72, "val": 18}
    assert any("val has 18 images: one is 5.6 points of top-1" in text for text in said)
    log = (folder / "runs/train_classifier/poolformer_s12-0/log.txt").read_text()
    assert "starts from released/poolformer_s12.pth.tar; classes: a new head of 3 in place of its 1000" in log
    accuracies, prediction, labels = (said[place] for place in (6, 7, -1))
    measured = json.loads((folder / "results/evaluate_classifier/poolformer_s12-0.json").read_text())
    wrong = round(18 - 18 * measured["top1"] / 100)
    assert len(re.findall(r"IMG \d+", accuracies)) == wrong
    images = pd.read_csv(folder / "data/beton/imagenet/val.beton.manifest.csv")["path"].tolist()
    predicted = pd.read_parquet(folder / "predictions/evaluate_classifier/poolformer_s12-0.parquet")
    row = predicted.iloc[images.index("x_1/IMG 0.jpg")]
    name, _, percent = prediction.strip().rpartition(": ")
    assert name == sorted(NAMES)[row["predicted"][0]]
    assert float(percent[:-1]) == pytest.approx(100 * row["probability"][0], abs=0.1)
    assert re.search(r"\['1: \d+%'|\['2: 100%'", labels)
    table = pd.read_csv(folder / "reports/table4_ade20k.csv").set_index("model").loc["poolformer_s12"]
    assert table["verdict"].startswith("not comparable: one's own images")
    assert (table["seeds"], pd.isna(table["difference"])) == (1, True)
