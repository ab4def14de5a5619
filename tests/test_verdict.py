"""Verdicts: calibrated against simulation, the rule at its edges, and what a verdict says."""

import itertools
import math
import statistics

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.paper import judge_released, judge_retraining, judge_table
from pipeline.paper.claims import identifier, judge_claims, names
from pipeline.paper.paired import compare_miou, compare_top1
from pipeline.paper.spread import Spread, pooled, with_own
from pipeline.paper.verdict import MIOU, TOP1, Rule, not_told_apart

percent = st.floats(0, 100, allow_nan=False)


# --- released weights ------------------------------------------------------------------------------


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


# --- the spread between seeds ----------------------------------------------------------------------


def test_public_reruns_are_pooled_over_their_groups() -> None:
    """Five groups of five with these sds, and three runs whose sd is 0.032."""
    squares = [0.3512**2, 0.4175**2, 0.3195**2, 0.4449**2, 0.2835**2]
    assert MIOU.prior.dof == 22
    assert MIOU.prior.sd == pytest.approx(math.sqrt((4 * sum(squares) + 2 * 0.0321**2) / 22), abs=0.003)
    assert MIOU.prior.source == "mmsegmentation pull request 2191; official issue 19"


def test_a_tolerance_is_students_prediction_interval() -> None:
    """By hand for one seed, 22 degrees of freedom (t = 2.0739) and a number rounded to a tenth."""
    spread = Spread(0.35, 22, "by hand")
    assert spread.tolerance(1) == pytest.approx(2.0739 * math.sqrt(2 * 0.35**2 + 0.01 / 12), rel=1e-4)
    assert spread.tolerance(5) == pytest.approx(2.0739 * math.sqrt(1.2 * 0.35**2 + 0.01 / 12), rel=1e-4)
    tolerances = [spread.tolerance(seeds) for seeds in (1, 2, 5, 100)]
    assert tolerances == sorted(tolerances, reverse=True)


def test_own_seeds_count_by_their_degrees_of_freedom() -> None:
    prior = Spread(0.1, 20, "a")
    assert with_own(prior, []).sd == pytest.approx(0.1)
    both = with_own(prior, [Spread.of([1.0, 1.2, 1.4], "b")])
    assert (both.dof, both.source) == (22, "a; b")
    assert both.sd == pytest.approx(math.sqrt((20 * 0.01 + 2 * 0.04) / 22))
    assert pooled([both]).sd == pytest.approx(both.sd)


def test_a_diverged_run_does_not_widen_the_others_tolerance() -> None:
    assert with_own(TOP1.prior, [Spread.of([77.2, 77.1, 0.1], "")]).sd == pytest.approx(TOP1.prior.sd)


def simulated(random: np.random.Generator, shift: float, seeds: int) -> str:
    """The verdict of one invented project: public reruns, the paper's one run, and runs `shift` points off, one sd."""
    sd, dof = 0.35, 22
    known = math.sqrt(random.chisquare(dof) / dof) * sd
    rule = Rule("mIoU", Spread(known, dof, "simulated"))
    paper = round(random.normal(42.0, sd), 1)
    verdict = judge_retraining(list(random.normal(42.0 + shift, sd, seeds)), paper, rule=rule)
    assert verdict.difference is not None
    return "short" if verdict.status == "outside" and verdict.difference < 0 else verdict.status


@pytest.mark.parametrize("seeds", [1, 5])
def test_of_true_reproductions_95_in_100_are_within(seeds: int) -> None:
    random = np.random.default_rng(1)
    verdicts = [simulated(random, 0.0, seeds) for _ in range(2000)]
    assert 0.93 <= verdicts.count("within") / len(verdicts) <= 0.97


def test_a_model_that_is_a_point_short_is_found_as_often_as_stated() -> None:
    random = np.random.default_rng(2)
    verdicts = [simulated(random, -1.0, 5) for _ in range(2000)]
    stated = Spread(0.35, 22, "").power(5, 1.0)
    assert verdicts.count("short") / len(verdicts) == pytest.approx(stated, abs=0.04)
    assert stated == pytest.approx(0.7, abs=0.02)


@pytest.mark.parametrize("seeds", [1, 3, 5])
def test_the_smallest_shortfall_is_found_in_80_of_100(seeds: int) -> None:
    for spread in (TOP1.prior, MIOU.prior):
        assert spread.power(seeds, spread.smallest_shortfall(seeds)) == pytest.approx(0.8, abs=1e-6)
        assert spread.power(seeds, 0.0) == pytest.approx(0.025, abs=1e-6)


# --- retrainings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ([77.5], "within"),
        ([76.9], "within"),
        ([77.54], "inconclusive"),
        ([70.0], "inconclusive"),
        ([77.45, 77.45], "within"),
        ([77.6, 77.6], "outside"),
        ([76.0, 76.1, 76.2], "outside"),
        ([76.9, 77.0, 77.1], "within"),
    ],
)
def test_top1_of_a_retraining(values: list[float], status: str) -> None:
    assert judge_retraining(values, 77.2, rule=TOP1).status == status


@pytest.mark.parametrize("values", [[77.2, 77.1, 0.1], [78.2, 76.2]])
def test_seeds_that_differ_far_more_than_such_runs_do_are_inconclusive(values: list[float]) -> None:
    verdict = judge_retraining(values, 77.2, rule=TOP1)
    assert verdict.status == "inconclusive"
    assert "seeds differ too much" in verdict.label
    assert verdict.is_diverged


@pytest.mark.parametrize(
    ("values", "status"), [([36.3], "within"), ([36.0], "inconclusive"), ([36.0, 35.9], "outside")]
)
def test_miou_of_a_retraining(values: list[float], status: str) -> None:
    assert judge_retraining(values, 37.2, rule=MIOU).status == status


def test_mmsegs_own_reruns_of_s36_are_short() -> None:
    """They have another recipe, and five of them tell."""
    runs = [41.16, 41.33, 41.08, 40.55, 40.76]
    verdict = judge_retraining(runs, 42.0, rule=MIOU)
    assert verdict.status == "outside"
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
    assert sentence == "top-1 77.10 (sd 0.14, 2 seeds) against 77.2 in the paper (-0.10; tolerance 0.29): within."
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


# --- the whole table -------------------------------------------------------------------------------

PAPER = {"S12": 37.2, "S24": 40.3, "S36": 42.0, "M36": 42.4, "M48": 42.7}


def test_five_small_shortfalls_are_each_within_and_together_short() -> None:
    verdicts = [judge_retraining([number - 0.7], number, rule=MIOU) for number in PAPER.values()]
    assert {verdict.status for verdict in verdicts} == {"within"}
    whole = judge_table(verdicts, MIOU.prior)
    assert whole is not None
    assert whole.difference == pytest.approx(-0.7)
    assert whole.high < 0
    assert "5 rows" in whole.sentence
    assert "the table as a whole is short" in whole.sentence


def test_a_table_is_judged_by_the_rows_that_can_be() -> None:
    good = judge_retraining([77.2], 77.2, rule=TOP1)
    diverged = judge_retraining([77.2, 0.1], 77.2, rule=TOP1)
    elsewhere = judge_retraining([70.0], 77.2, rule=TOP1, comparable=False, reason="digits")
    assert judge_table([good, diverged, elsewhere], TOP1.prior) is None
    whole = judge_table([good, good, diverged, elsewhere], TOP1.prior)
    assert whole is not None
    assert (whole.rows, "no evidence of a shift" in whole.sentence) == (2, True)


def test_the_whole_tables_interval_holds_the_truth_in_95_of_100() -> None:
    random, held = np.random.default_rng(3), 0
    for _ in range(1000):
        known = math.sqrt(random.chisquare(22) / 22) * 0.35
        spread = Spread(known, 22, "simulated")
        rule = Rule("mIoU", spread)
        papers = [round(random.normal(mean, 0.35), 1) for mean in PAPER.values()]
        runs = [[random.normal(mean - 0.5, 0.35)] for mean in PAPER.values()]
        verdicts = [judge_retraining(run, paper, rule=rule) for run, paper in zip(runs, papers, strict=True)]
        whole = judge_table(verdicts, spread)
        assert whole is not None
        held += whole.low <= -0.5 <= whole.high
    assert 0.93 <= held / 1000 <= 0.97


def test_what_the_tolerance_cannot_tell_apart_is_named() -> None:
    assert not_told_apart(PAPER, MIOU.prior.tolerance(1)) == [("S36", "M36", "M48")]
    assert not_told_apart(PAPER, 0.35) == [("M36", "M48")]
    assert not_told_apart(PAPER, 0.1) == []


# --- the same images -------------------------------------------------------------------------------


def classified(right: list[bool]) -> pd.DataFrame:
    predicted = [[7, 1] if each else [1, 7] for each in right]
    return pd.DataFrame({"sample_id": range(len(right)), "label": 7, "predicted": predicted})


def test_mcnemar_by_hand() -> None:
    """Eight images that one alone gets right against two: P(2 or fewer of 10) = 56 / 1024, twice."""
    here = classified([True] * 90 + [True] * 8 + [False] * 2)
    there = classified([True] * 90 + [False] * 8 + [True] * 2)
    found = compare_top1(here, there)
    assert (found.only_here, found.only_there) == (8, 2)
    assert found.difference == pytest.approx(6.0)
    assert found.p == pytest.approx(2 * 56 / 1024)
    half = 1.959964 * math.sqrt(0.1 - 0.06**2) / math.sqrt(100)
    assert (found.low, found.high) == (pytest.approx(6 - 100 * half, abs=1e-3), pytest.approx(6 + 100 * half, abs=1e-3))
    assert compare_top1(here, here).p == 1.0


def segmented(random: np.random.Generator, skill: float, images: int = 60) -> pd.DataFrame:
    rows = []
    for sample, shown in itertools.product(range(images), range(4)):
        labelled = 100 + 10 * shown + sample % 7
        correct = int(random.binomial(labelled, skill))
        rows.append((sample, shown, correct, labelled, correct + int(random.integers(0, 20))))
    return pd.DataFrame(rows, columns=["sample_id", "class", "correct", "labelled", "predicted"])


def test_a_bootstrap_finds_a_better_segmenter_and_its_miou() -> None:
    random = np.random.default_rng(0)
    better, worse = segmented(random, 0.9), segmented(random, 0.8)
    found = compare_miou(better, worse)
    sums = [table.groupby("class")[["correct", "labelled", "predicted"]].sum() for table in (better, worse)]
    mious = [(100 * s["correct"] / (s["labelled"] + s["predicted"] - s["correct"])).mean() for s in sums]
    assert found.difference == pytest.approx(mious[0] - mious[1])
    assert 0 < found.low < found.difference < found.high
    assert found == compare_miou(better, worse)
    same = compare_miou(better, better)
    assert (same.difference, same.low, same.high) == (0, 0, 0)


def test_other_images_are_not_paired() -> None:
    with pytest.raises(ValueError, match="not of the same images"):
        compare_top1(classified([True] * 3), classified([True] * 4))
    table = segmented(np.random.default_rng(0), 0.9)
    with pytest.raises(ValueError, match="not of the same images"):
        compare_miou(table, table[table["sample_id"] > 0])


# --- claims ----------------------------------------------------------------------------------------


def test_names_of_models_in_predicates() -> None:
    assert [identifier(model) for model in ("PoolFormer-S12", "ViT-B/16*", "Swin-Mixer-T/D24", "identity")] == [
        "S12", "ViT_B_16", "Swin_Mixer_T_D24", "identity",
    ]  # fmt: skip
    assert names("(S24 > DeiT_S) & (S24 - S12 > 2)") == ["S24", "DeiT_S", "S12"]


def test_a_claim_holds_fails_or_was_not_measured() -> None:
    claims = {claim.predicate: claim for claim in judge_claims({"table2_imagenet": {"S24": 80.3, "DeiT_S": 79.8}})}
    assert claims["S24 > DeiT_S"].outcome == "holds"
    assert claims["S24 > DeiT_S"].values == "S24 80.30, DeiT_S 79.80"
    assert claims["S24 - RSB_ResNet_34 > 4"].outcome == "not measured"
    assert claims["S24 - RSB_ResNet_34 > 4"].values == "S24 80.30, RSB_ResNet_34 ?"
    failed = judge_claims({"table2_imagenet": {"S24": 79.0}})
    assert {claim.predicate: claim.outcome for claim in failed}["S24 > 80"] == "fails"
