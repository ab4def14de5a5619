"""Table 2: ImageNet-1K classification."""

from typing import Any

from pipeline.comparisons.description import Column, Comparison, Figure, Row
from pipeline.paper import label, numbers
from pipeline.paper.verdict import TOP1, judge_released
from pipeline.tasks.classification.description import CLASSIFIER, IMAGENET, TEST_SETS
from pipeline.variants import VARIANTS

FURTHER = {"real": "ReaL labels", **{name: test_set.title for name, test_set in TEST_SETS.items()}}
"""Further labels and images: prefix of their numbers, and title."""


def classifier_cells(row: Row, judged: dict[str, Any]) -> dict[str, Any]:
    """What each table of classifiers has."""
    return {
        "params_m": row.property("parameters", 1e-6),
        "macs_g": row.property("macs_g"),
        "paper_params_m": row.paper.get("params"),
        "paper_macs_g": row.paper.get("macs"),
        **judged,
        "released_top5": row.file.get("top5"),
        "measured_top5": row.mean("top5"),
        "loss": row.mean("loss"),
        "images": row.mean("images"),
        "train_images_per_s": row.mean("train_images_per_s"),
        "gpu_hours": row.mean("gpu_hours"),
    }


def _cells(row: Row, judged: dict[str, Any]) -> dict[str, Any]:
    published = numbers("released_imagenet", label(row.variant))
    further: dict[str, float | None] = {}
    for key in (f"{name}_top1" for name in FURTHER):
        released, measured = row.file.get(key), row.mean(key)
        shown = published.get(key) if released is not None or measured is not None else None
        further |= {f"{key}_published": shown, f"{key}_released": released, f"{key}_measured": measured}
    return {**classifier_cells(row, judged), **further}


def _remarks(row: Row) -> list[str]:
    """The released weights on further labels and images, against what timm published of them."""
    published, remarks = numbers("released_imagenet", label(row.variant)), []
    for name, title in FURTHER.items():
        value, expected = row.file.get(f"{name}_top1"), published.get(f"{name}_top1")
        images = row.file.get("images" if name == "real" else f"{name}_images")
        wanted = IMAGENET.splits[IMAGENET.evaluation].images if name == "real" else TEST_SETS[name].images
        if value is not None and expected is not None:
            complete = images == wanted
            reason = "" if complete else f"{images:,.0f} images in place of {wanted:,}"
            verdict = judge_released(
                value, expected, rule=TOP1, file=f"{row.file['file']} on {title}", comparable=complete, reason=reason
            )
            remarks.append(verdict.sentence)
    return remarks


def _published(row: Row) -> float | None:
    return numbers("released_imagenet", label(row.variant)).get("top1")


TABLE2 = Comparison(
    name="table2_imagenet",
    title="Table 2: ImageNet-1K classification",
    experiment="Table 2: ImageNet-1K classification",
    task=CLASSIFIER,
    names=tuple(VARIANTS),
    measured="top1",
    quantity="top1",
    rule=TOP1,
    metric_label="top-1, %",
    columns=(
        Column("", "Model", "model", terminal="Model"),
        Column("Parameters, M", "paper", "paper_params_m", 0),
        Column("Parameters, M", "counted", "params_m"),
        Column("MACs, G", "paper", "paper_macs_g", 1),
        Column("MACs, G", "counted", "macs_g"),
        Column("Top-1, %", "paper", "paper", 1, terminal="Paper"),
        Column("Top-1, %", "released", "released", terminal="Released"),
        Column("Top-1, %", "measured", "measured", spread="sd", terminal="Measured"),
        Column("Top-1, %", "difference", "difference", sign="+", terminal="Diff."),
        Column("Top-1, %", "tolerance", "tolerance", sign="±"),
        Column("", "Seeds", "seeds", 0, terminal="Seeds"),
        Column("", "Verdict", "verdict", terminal="Verdict"),
        Column("Top-5, %", "measured", "measured_top5"),
        *(
            Column(f"{title}, %", column, f"{name}_top1_{key}")
            for name, title in FURTHER.items()
            for key, column in (("published", "timm"), ("released", "released"), ("measured", "measured"))
        ),
        Column("Training", "images/s", "train_images_per_s", 0),
        Column("Training", "GPU-hours", "gpu_hours", 0),
    ),
    cells=_cells,
    published=_published,
    remarks=_remarks,
    fields_of_others=("ade20k.", "segmentation.", "evaluation.segmentation."),
    fields_of_training=("classification.", "segmentation."),
    paired="pipeline.paper.paired:compare_top1",
    figures=(
        Figure(
            "accuracy_macs",
            ("macs", "macs_g", "MACs, G"),
            ("top1", "top-1, %"),
            "Top-1 accuracy against multiply-adds of one image of 224 x 224 pixels.",
        ),
        Figure(
            "accuracy_params",
            ("params", "params_m", "parameters, M"),
            ("top1", "top-1, %"),
            "Top-1 accuracy against parameters.",
        ),
    ),
)
