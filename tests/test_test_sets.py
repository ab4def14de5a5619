"""Further test sets and labels: the classes of their folders, and the ReaL labels as timm reads them."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.data.real_labels import RealLabelsImagenet

from pipeline import doctor
from pipeline.config import load_params
from pipeline.errors import UserError
from pipeline.experiments import compose
from pipeline.tasks.classification.description import TEST_SETS, classes_of, file_of_timm
from pipeline.tasks.classification.test_sets import real_accuracy

SYNSETS = file_of_timm("imagenet_synsets.txt").read_text().split()


def test_folders_are_told_by_synset_and_by_number() -> None:
    assert classes_of(SYNSETS, "sketch", Path("x")) == list(range(1000))
    by_number = sorted(map(str, range(1000)))  # as ImageNetV2's folders are listed: 0, 1, 10, 100, 101, ...
    assert classes_of(by_number, "v2", Path("x")) == [int(name) for name in by_number]
    for name in ("a", "r"):
        synsets = file_of_timm(f"imagenet_{name}_synsets.txt").read_text().split()
        assert [SYNSETS[number] for number in classes_of(synsets, name, Path("x"))] == synsets
        assert len(synsets) == 200


@pytest.mark.parametrize(
    ("folders", "name", "says"),
    [
        (SYNSETS[:999], "sketch", "x has 999 class folders, ImageNet-Sketch has 1000"),
        ([*SYNSETS[:999], "n00000000"], "v2", "n00000000 is none of its classes"),
        (SYNSETS, "a", "x has 1000 class folders, ImageNet-A has 200"),
    ],
)
def test_other_folders_are_refused(folders: list[str], name: str, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        classes_of(folders, name, Path("x"))


def test_real_labels_are_counted_as_timm_does() -> None:
    files = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 50_001)]
    random = np.random.default_rng(0)
    shuffled = [files[index] for index in random.permutation(len(files))]
    theirs = RealLabelsImagenet(shuffled)
    right = [theirs.real_labels[file] for file in shuffled]
    logits = torch.from_numpy(random.normal(size=(len(files), 50))).float()
    logits = torch.nn.functional.pad(logits, (0, 950), value=-100.0)
    for row, labels in enumerate(right):
        if labels and row % 3:
            logits[row, labels[-1]] = 2.0 + row % 2  # sometimes first, sometimes among five
    theirs.add_result(logits)
    ours = real_accuracy(shuffled, logits.topk(5).indices.tolist())
    assert ours["real_top1"] == pytest.approx(theirs.get_accuracy(1))
    assert ours["real_top5"] == pytest.approx(theirs.get_accuracy(5))
    assert 10 < ours["real_top1"] < ours["real_top5"] < 100


def test_without_imagenets_file_names_there_is_no_real_accuracy() -> None:
    assert real_accuracy(["digit_3/0017.JPEG"], [[1, 2, 3, 4, 5]]) == {}


def test_every_test_set_has_published_numbers() -> None:
    from pipeline.paper import wide

    columns = set(wide("released_imagenet").columns)
    assert {f"{name}_top1" for name in [*TEST_SETS, "real"]} <= columns


def test_doctor_names_a_test_set_that_is_not_there_or_is_another(in_checkout: Path) -> None:
    compose(["scale=released", "test_sets.names=[v2,sketch]"])
    (in_checkout / "data/test_sets/sketch/n01440764").mkdir(parents=True)
    found = {finding.subject: finding for finding in doctor._test_sets(load_params(Path("params.yaml")))}
    assert found["ImageNetV2"].level == found["ImageNet-Sketch"].level == "fault"
    assert "data/test_sets/v2 is missing" in found["ImageNetV2"].text
    assert "has 1 class folders, ImageNet-Sketch has 1000" in found["ImageNet-Sketch"].text
