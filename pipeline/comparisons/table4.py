"""Table 4: ADE20K semantic segmentation with Semantic FPN.

The number held against the paper is mIoU* (aligned resize), the paper's own test protocol.
"""

from typing import Any

from pipeline.comparisons.description import Column, Comparison, Figure, Row
from pipeline.paper import label, numbers, released_file
from pipeline.paper.verdict import MIOU
from pipeline.tasks.segmentation.description import SEGMENTER
from pipeline.variants import VARIANTS


def _cells(row: Row, judged: dict[str, Any]) -> dict[str, Any]:
    mmseg = numbers("mmseg_ade20k", label(row.variant))
    return {
        "params_m": row.property("parameters", 1e-6),
        "macs_g": row.property("macs_g"),
        "paper_params_m": row.paper.get("params"),
        **judged,
        "released_miou": row.file.get("miou"),
        "released_miou_ms_flip": row.file.get("miou_ms_flip"),
        "released_miou_aligned_ms_flip": row.file.get("miou_aligned_ms_flip"),
        "official_checkpoint": mmseg.get("official_miou_aligned"),
        "mmseg_miou": mmseg.get("mmseg_miou"),
        "mmseg_miou_aligned": mmseg.get("mmseg_miou_aligned"),
        "mmseg_reruns_mean": mmseg.get("rerun_miou_aligned_mean"),
        "mmseg_reruns_sd": mmseg.get("rerun_miou_aligned_sd"),
        "mmseg_train_memory_gb": mmseg.get("train_memory"),
        "mmseg_images_per_s": mmseg.get("images_per_s"),
        "measured_miou": row.mean("miou"),
        "measured_miou_ms_flip": row.mean("miou_ms_flip"),
        "measured_miou_aligned_ms_flip": row.mean("miou_aligned_ms_flip"),
        "aacc": row.mean("aacc"),
        "macc": row.mean("macc"),
        "images": row.mean("images"),
        "train_memory_gb": row.mean("train_memory_gb"),
        "train_images_per_s": row.mean("train_images_per_s"),
        "gpu_hours": row.mean("gpu_hours"),
        "images_per_s": row.property("images_per_s"),
    }


def _published(row: Row) -> float | None:
    """mmsegmentation's file has mmsegmentation's measurement, the authors' its own."""
    is_mmseg = bool(row.paper) and row.file.get("file") == released_file("segmentation", row.variant)
    mmseg = numbers("mmseg_ade20k", label(row.variant))
    return mmseg.get("mmseg_miou_aligned" if is_mmseg else "official_miou_aligned")


TABLE4 = Comparison(
    name="table4_ade20k",
    title="Table 4: ADE20K semantic segmentation with Semantic FPN",
    experiment="Table 4: ADE20K segmentation",
    task=SEGMENTER,
    names=tuple(VARIANTS),
    measured="miou_aligned",
    quantity="miou",
    rule=MIOU,
    metric_label="mIoU*, %",
    columns=(
        Column("", "Model", "model", terminal="Model"),
        Column("Parameters, M", "paper", "paper_params_m", 1),
        Column("Parameters, M", "counted", "params_m"),
        Column("MACs, G", "counted", "macs_g"),
        Column("mIoU*, %", "paper", "paper", 1, terminal="Paper"),
        Column("mIoU*, %", "released", "released", terminal="Released"),
        Column("mIoU*, %", "measured", "measured", spread="sd", terminal="Measured"),
        Column("mIoU*, %", "difference", "difference", sign="+", terminal="Diff."),
        Column("mIoU*, %", "tolerance", "tolerance", sign="±"),
        Column("", "Seeds", "seeds", 0, terminal="Seeds"),
        Column("", "Verdict", "verdict", terminal="Verdict"),
        Column("Released, %", "mIoU* ms+flip", "released_miou_aligned_ms_flip"),
        Column("Released, %", "mIoU", "released_miou"),
        Column("Released, %", "mIoU ms+flip", "released_miou_ms_flip"),
        Column("Measured, %", "mIoU* ms+flip", "measured_miou_aligned_ms_flip"),
        Column("Measured, %", "mIoU", "measured_miou"),
        Column("Measured, %", "mIoU ms+flip", "measured_miou_ms_flip"),
        Column("mmseg, %", "mIoU*", "mmseg_miou_aligned"),
        Column("mmseg, %", "mIoU", "mmseg_miou"),
        Column("Memory, GB", "mmseg", "mmseg_train_memory_gb"),
        Column("Memory, GB", "here", "train_memory_gb"),
        Column("Images/s", "mmseg", "mmseg_images_per_s", 1),
        Column("Images/s", "here", "images_per_s", 1),
    ),
    cells=_cells,
    published=_published,
    fields_of_others=("evaluation.classification.",),
    fields_of_training=("classification.", "segmentation.", "imagenet."),
    paired="pipeline.paper.paired:compare_miou",
    figures=(
        Figure(
            "miou_params",
            ("params", "params_m", "parameters, M"),
            ("miou", "mIoU*, %"),
            "mIoU* against the parameters of backbone and head; the paper's S24 stands at its misprinted 23.2 M.",
        ),
    ),
    notes=(
        "mIoU* is measured after an aligned resize: fitted into 2048 x 512, then both sides rounded up to a multiple "
        "of 32. So is the paper's number. mIoU: without the rounding. ms+flip: over six scales and their mirrors.",
        "mmseg: mmsegmentation's own training and measurements; memory of each of 8 GPUs in training, images/s on one "
        "V100 in inference, one image at a time. Here: measured the same way, where it runs on a GPU.",
        "MACs: counted with fvcore at 512 x 512; the paper gives none for Table 4.",
    ),
)
