"""Table 2: ImageNet-1K classification."""

from typing import Any

from pipeline.comparisons.description import Column, Comparison, Figure, Row
from pipeline.paper import label, numbers
from pipeline.paper.verdict import TOP1
from pipeline.tasks.classification.description import CLASSIFIER


def _cells(row: Row, judged: dict[str, Any]) -> dict[str, Any]:
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


def _published(row: Row) -> float | None:
    return numbers("released_imagenet", label(row.variant)).get("top1")


TABLE2 = Comparison(
    name="table2_imagenet",
    title="Table 2: ImageNet-1K classification",
    experiment="Table 2: ImageNet-1K classification",
    task=CLASSIFIER,
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
        Column("Training", "images/s", "train_images_per_s", 0),
        Column("Training", "GPU-hours", "gpu_hours", 0),
    ),
    cells=_cells,
    published=_published,
    fields_of_others=("ade20k.", "segmentation.", "evaluation.segmentation."),
    fields_of_training=("classification.", "segmentation."),
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
