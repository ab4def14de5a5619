"""Table 5: ablations of PoolFormer-S12 on ImageNet-1K. Its first row is Table 2's S12."""

from typing import Any

from pipeline.ablations import ABLATIONS
from pipeline.comparisons.description import Baseline, Column, Comparison, Figure, Row
from pipeline.comparisons.table2 import classifier_cells
from pipeline.paper import numbers, rows
from pipeline.paper.verdict import TOP1
from pipeline.tasks.ablation.description import ABLATION
from pipeline.tasks.classification.description import CLASSIFIER

NAME = "table5_ablations"
BASELINE = "baseline"
CHANGES = {row["model"]: f"{row['group']}: {row['change']}" for row in rows(NAME)} | {BASELINE: "none"}
"""As "token mixer: identity"."""


def _cells(row: Row, judged: dict[str, Any]) -> dict[str, Any]:
    return {"change": CHANGES.get(row.variant, ""), **classifier_cells(row, judged)}


def _published(row: Row) -> float | None:
    """A measurement of the very file with three digits where there is one, else the paper's number."""
    return numbers("released_ablations", row.variant).get("top1", row.paper.get("top1"))


TABLE5 = Comparison(
    name=NAME,
    title="Table 5: ablations of PoolFormer-S12",
    experiment="Table 5: ablations of PoolFormer-S12",
    task=ABLATION,
    names=(BASELINE, *ABLATIONS),
    measured="top1",
    quantity="top1",
    rule=TOP1,
    metric_label="top-1, %",
    columns=(
        Column("", "Model", "model", terminal="Model"),
        Column("", "Change", "change"),
        Column("Parameters, M", "paper", "paper_params_m", 1),
        Column("Parameters, M", "counted", "params_m"),
        Column("MACs, G", "paper", "paper_macs_g", 1),
        Column("MACs, G", "counted", "macs_g"),
        Column("Top-1, %", "paper", "paper", 1, terminal="Paper"),
        Column("Top-1, %", "released", "released", terminal="Released"),
        Column("Top-1, %", "measured", "measured", spread="sd", terminal="Measured"),
        Column("Top-1, %", "difference", "difference", sign="+"),
        Column("Top-1, %", "tolerance", "tolerance", sign="±"),
        Column("", "Seeds", "seeds", 0, terminal="Seeds"),
        Column("", "Verdict", "verdict", terminal="Verdict"),
        Column("Against the baseline, points", "paper", "paper_effect", 1, sign="+"),
        Column("Against the baseline, points", "measured", "effect", sign="+", terminal="Effect"),
        Column("Against the baseline, points", "tolerance", "effect_tolerance", sign="±"),
        Column("Against the baseline, points", "verdict", "effect_verdict"),
        Column("Top-5, %", "measured", "measured_top5"),
        Column("Training", "images/s", "train_images_per_s", 0),
        Column("Training", "GPU-hours", "gpu_hours", 0),
    ),
    cells=_cells,
    published=_published,
    fields_of_others=("ade20k.", "segmentation.", "evaluation.segmentation."),
    fields_of_training=("ablations.",),
    baseline=Baseline(BASELINE, CLASSIFIER, "poolformer_s12"),
    paired="pipeline.paper.paired:compare_top1",
    figures=(
        Figure(
            "mixers_macs",
            ("macs", "macs_g", "MACs, G"),
            ("top1", "top-1, %"),
            "Top-1 accuracy of the token mixers against multiply-adds of one image of 224 x 224 pixels. The baseline "
            "has pooling; p, a and f are pooling, attention and spatial FC, by stage.",
            models=(BASELINE, "identity", "random_matrix", "depthwise_conv", "pppa", "ppaa", "pppf", "ppff"),
            is_connected=False,
        ),
    ),
    notes=(
        "The baseline is PoolFormer-S12 of Table 2, the same run.",
        "Against the baseline: what a change does, measured and in the paper. Each is a difference of two trainings: "
        "its tolerance is wider than a row's by about the square root of two.",
        "One sd between seeds stands for all rows. Where training fails (no_norm, no_residual, no_mlp) seeds may "
        "differ by more, and a difference says less.",
        "Released weights are held against the printed number, which is rounded to 0.1, where no measurement with more "
        "digits is known.",
    ),
)
