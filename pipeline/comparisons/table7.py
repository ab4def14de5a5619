"""Table 7: longer training of PoolFormer-S12 on ImageNet-1K. Its first row is Table 2's S12."""

from typing import Any

from pipeline.comparisons.description import Baseline, Column, Comparison, Figure, Row
from pipeline.comparisons.table2 import classifier_cells
from pipeline.paper import numbers, rows
from pipeline.paper.verdict import TOP1
from pipeline.tasks.classification.description import CLASSIFIER
from pipeline.tasks.classification.longer_training import BASE, LONGER

NAME = "table7_longer_training"
GUIDE_EPOCHS, COOLDOWN_EPOCHS = 310, 10
"""Of the cost guide's trainings, and of each of the official command's."""


def _cells(row: Row, judged: dict[str, Any]) -> dict[str, Any]:
    epochs = row.paper.get("epochs")
    hours = numbers("training_cost", "PoolFormer-S12")["gpu_hours"] / GUIDE_EPOCHS
    return {
        "epochs": epochs,
        **classifier_cells(row, judged),
        "guide_gpu_hours": None if epochs is None else hours * (epochs + COOLDOWN_EPOCHS),
    }


TABLE7 = Comparison(
    name=NAME,
    title="Table 7: longer training of PoolFormer-S12",
    experiment="Table 7: longer training of PoolFormer-S12",
    task=LONGER,
    names=tuple(dict.fromkeys(row["model"] for row in rows(NAME))),
    measured="top1",
    quantity="top1",
    rule=TOP1,
    metric_label="top-1, %",
    columns=(
        Column("", "Model", "model", terminal="Model"),
        Column("", "Epochs", "epochs", 0),
        Column("Top-1, %", "paper", "paper", 1, terminal="Paper"),
        Column("Top-1, %", "measured", "measured", spread="sd", terminal="Measured"),
        Column("Top-1, %", "difference", "difference", sign="+", terminal="Diff."),
        Column("Top-1, %", "tolerance", "tolerance", sign="±"),
        Column("", "Seeds", "seeds", 0, terminal="Seeds"),
        Column("", "Verdict", "verdict", terminal="Verdict"),
        Column("Against 300 epochs, points", "paper", "paper_effect", 1, sign="+"),
        Column("Against 300 epochs, points", "measured", "effect", sign="+", terminal="Gain"),
        Column("Against 300 epochs, points", "tolerance", "effect_tolerance", sign="±"),
        Column("Against 300 epochs, points", "verdict", "effect_verdict"),
        Column("Training", "images/s", "train_images_per_s", 0),
        Column("Training", "GPU-hours", "gpu_hours", 0),
        Column("Training", "GPU-hours, RTX 3090", "guide_gpu_hours", 0),
    ),
    cells=_cells,
    published=lambda row: None,
    fields_of_others=("ade20k.", "segmentation.", "evaluation.segmentation."),
    fields_of_training=("longer_training.",),
    baseline=Baseline("epochs_300", CLASSIFIER, BASE),
    paired="pipeline.paper.paired:compare_top1",
    figures=(
        Figure(
            "accuracy_epochs",
            ("epochs", "epochs", "epochs"),
            ("top1", "top-1, %"),
            "Top-1 accuracy of PoolFormer-S12 against the length of its training.",
            is_named=False,
        ),
    ),
    notes=(
        "The first row is PoolFormer-S12 of Table 2, the same run. Epochs are those of the cosine; the official "
        "command's 10 of cool-down are added to each.",
        "GPU-hours, RTX 3090: by the cost guide, as `python -m pipeline plan` has them.",
    ),
)
