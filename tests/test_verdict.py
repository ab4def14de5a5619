"""Verdicts: the rule at its edges, and what a verdict says."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.paper import judge_released, judge_retraining
from pipeline.paper.verdict import MIOU, TOP1, Rule

percent = st.floats(0, 100, allow_nan=False)


@pytest.mark.parametrize(
    ("value", "status"),
    [(77.238, "within"), (77.288, "within"), (77.188, "within"), (77.29, "outside"), (0.1, "outside")],
)
def test_released_weights_are_judged_to_a_twentieth(value: float, status: str) -> None:
    verdict = judge_released(value, 77.238, rule=TOP1, file="poolformer_s12.pth.tar")
    assert verdict.status == status
    assert verdict.tolerance == 0.05
    assert verdict.difference == pytest.approx(value - 77.238)
    assert verdict.sd is None
    assert "poolformer_s12.pth.tar" in verdict.sentence


def test_released_weights_measured_otherwise_are_named_so() -> None:
    verdict = judge_released(77.0, 77.238, rule=TOP1, file="x.pth.tar", recipe_differences=["imagenet.storage"])
    assert verdict.status == "outside"
    assert "not the paper's recipe: imagenet.storage" in verdict.label


def test_a_missing_file_is_named() -> None:
    verdict = judge_released(None, 77.238, rule=TOP1, file="poolformer_s12.pth.tar")
    assert verdict.status == "missing"
    assert verdict.label == "missing: poolformer_s12.pth.tar"


def test_released_weights_on_other_images_are_not_compared() -> None:
    verdict = judge_released(
        50.0, 77.238, rule=TOP1, file="f", comparable=False, reason="these images are handwritten digits"
    )
    assert verdict.label == "not comparable: these images are handwritten digits"
    assert verdict.difference is None
    assert verdict.tolerance is None


def test_a_released_number_that_is_not_finite_is_outside() -> None:
    assert judge_released(math.nan, 77.2, rule=TOP1, file="f").status == "outside"


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ([77.5], "within"),
        ([76.9], "within"),
        ([77.51], "inconclusive"),
        ([70.0], "inconclusive"),
        ([77.5, 77.5], "within"),
        ([77.6, 77.6], "outside"),
        ([76.0, 76.1, 76.2], "outside"),
        ([76.6, 76.9, 77.0], "within"),
    ],
)
def test_top1_of_a_retraining(values: list[float], status: str) -> None:
    assert judge_retraining(values, 77.2, rule=TOP1).status == status


def test_tolerance_widens_with_the_spread_between_seeds() -> None:
    tight = judge_retraining([76.79, 76.80, 76.81], 77.2, rule=TOP1)
    assert (tight.status, tight.tolerance) == ("outside", 0.3)
    loose = judge_retraining([76.5, 76.8, 77.1], 77.2, rule=TOP1)
    assert loose.sd == pytest.approx(0.3)
    assert loose.tolerance == pytest.approx(0.6)
    assert loose.status == "within"


def test_a_diverged_seed_does_not_buy_a_tolerance() -> None:
    verdict = judge_retraining([77.2, 77.1, 0.1], 77.2, rule=TOP1)
    assert verdict.status == "inconclusive"
    assert "seeds differ too much" in verdict.label


@pytest.mark.parametrize(
    ("values", "status"),
    [([36.1], "within"), ([36.0], "inconclusive"), ([36.0, 35.9], "outside"), ([36.2, 38.2], "within")],
)
def test_miou_has_a_fixed_tolerance(values: list[float], status: str) -> None:
    verdict = judge_retraining(values, 37.2, rule=MIOU)
    assert verdict.status == status
    assert verdict.tolerance == 1.1


def test_mmsegs_own_reruns_are_within() -> None:
    runs = [41.16, 41.33, 41.08, 40.55, 40.76]
    verdict = judge_retraining(runs, 42.0, rule=MIOU)
    assert verdict.status == "within"
    assert verdict.mean == pytest.approx(40.976)
    assert verdict.sd == pytest.approx(statistics.stdev(runs))
    assert verdict.seeds == 5


def test_nothing_trained_is_missing() -> None:
    verdict = judge_retraining([], 77.2, rule=TOP1)
    assert (verdict.status, verdict.label, verdict.seeds, verdict.mean) == ("missing", "missing", 0, None)


def test_a_seed_that_is_not_finite_is_not_averaged_away() -> None:
    verdict = judge_retraining([77.2, math.nan, 77.2], 77.2, rule=TOP1)
    assert verdict.label == "inconclusive: 1 of 3 seeds not finite"
    assert verdict.mean is None


def test_other_images_are_never_compared_however_near() -> None:
    verdict = judge_retraining([77.2, 77.2], 77.2, rule=TOP1, comparable=False, reason="handwritten digits")
    assert verdict.label == "not comparable: handwritten digits"
    assert (verdict.mean, verdict.seeds, verdict.difference, verdict.tolerance) == (77.2, 2, None, None)


def test_another_recipe_is_named_beside_the_status() -> None:
    fields = ["classification.epochs", "classification.mixup_alpha"]
    verdict = judge_retraining([77.2], 77.2, rule=TOP1, recipe_differences=fields)
    assert verdict.status == "within"
    note = "not the paper's recipe: classification.epochs, classification.mixup_alpha"
    assert verdict.label == f"within: {note}"
    assert note in verdict.sentence
    one = judge_retraining([70.0], 77.2, rule=TOP1, recipe_differences=["classification.epochs"])
    assert one.label == "inconclusive: one seed; not the paper's recipe: classification.epochs"


def test_the_sentence_has_every_number() -> None:
    sentence = judge_retraining([77.0, 77.2], 77.2, rule=TOP1).sentence
    assert sentence == "top-1 77.10 (sd 0.14, 2 seeds) against 77.2 in the paper (-0.10; tolerance 0.30): within."
    assert "\n" not in sentence


@given(st.lists(percent, min_size=1, max_size=6), percent, st.sampled_from([TOP1, MIOU]))
def test_verdicts_hold_together(values: list[float], published: float, rule: Rule) -> None:
    verdict = judge_retraining(values, published, rule=rule)
    assert verdict.seeds == len(values)
    assert (verdict.sd is None) == (len(values) == 1)
    assert verdict.difference is not None
    assert verdict.tolerance is not None
    assert verdict == judge_retraining(values, published, rule=rule)
    if verdict.status == "within":
        assert abs(verdict.difference) <= verdict.tolerance + 1e-6
    if verdict.status == "outside":
        assert len(values) > 1
        assert abs(verdict.difference) > verdict.tolerance


@given(st.lists(percent, min_size=1, max_size=6), percent)
def test_the_order_of_seeds_does_not_matter(values: list[float], published: float) -> None:
    forward = judge_retraining(values, published, rule=TOP1)
    backward = judge_retraining(values[::-1], published, rule=TOP1)
    assert forward.status == backward.status


def test_a_model_that_the_paper_lacks_is_measured_and_not_judged() -> None:
    for comparable in (True, False):
        verdict = judge_retraining([70.0, 71.0], None, rule=TOP1, comparable=comparable, reason="digits")
        assert (verdict.status, verdict.mean, verdict.difference) == ("not in the paper", 70.5, None)
        assert "70.50" in verdict.sentence
        assert judge_released(70.0, None, rule=TOP1, file="f", comparable=comparable).status == "not in the paper"
