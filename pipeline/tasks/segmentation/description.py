"""ADE20K semantic segmentation with Semantic FPN, described."""

from typing import Any

from pipeline.config import Params
from pipeline.tasks.classification.description import CLASSIFIER
from pipeline.tasks.description import DataSet, Metric, Split, Task
from pipeline.variants import VARIANTS, find_variant, macs, parameters

NECK, HEAD, CLASSES = 256, 128, 150
"""Channels of pyramid and head (pipeline.models.semantic_fpn), and ADE20K's classes."""
MEAN_ASPECT = 4 / 3
"""Of ADE20K's images."""
HEAD_CONVOLUTIONS = (((4, NECK),), ((8, NECK),), ((16, NECK), (8, HEAD)), ((32, NECK), (16, HEAD), (8, HEAD)))
"""Of each level: the stride that it works at and its input channels."""


def forward_gmacs(variant: str, image_px: float) -> float:
    widths, area = find_variant(variant).widths, image_px**2
    backbone = macs(find_variant(variant), image_px) - widths[-1] * 1000  # without its classifier
    pyramid = sum((width * NECK + 9 * NECK**2) * area / (4 << i) ** 2 for i, width in enumerate(widths))
    head = sum(9 * channels * HEAD * area / stride**2 for level in HEAD_CONVOLUTIONS for stride, channels in level)
    return (backbone + pyramid + head + HEAD * CLASSES * area / 16) / 1e9


def _parameters(params: Params, variant: str) -> int:
    spec, classes = find_variant(variant), params.ade20k.num_classes
    widths = spec.widths
    # A norm on each stage's output in place of the classifier's norm and linear layer.
    backbone = parameters(spec, 0) - 2 * widths[-1] + sum(2 * width for width in widths)
    pyramid = sum(width * NECK + NECK + 9 * NECK**2 + NECK for width in widths)
    head = sum(9 * channels * HEAD + 2 * HEAD for level in HEAD_CONVOLUTIONS for _, channels in level)
    return backbone + pyramid + head + HEAD * classes + classes


def _evaluation_gmacs(params: Params, variant: str) -> float:
    settings = params.evaluation.segmentation
    long, short = settings.scale
    passes = 2 * (1 + sum(2 * ratio**2 for ratio in settings.multi_scale_ratios))  # plain and aligned, each mirrored
    return passes * forward_gmacs(variant, 512) * short * min(long, short * MEAN_ASPECT) / 512**2


def _evaluation_arguments(params: Params, variant: str) -> dict[str, Any]:
    return {"settings": params.evaluation.segmentation.model_dump(mode="json")}


ADE20K = DataSet(
    name="ade20k",
    title="ADE20K",
    # ADEChallengeData2016, shared out by images.
    splits={
        "training": Split(20_210, 0.9e9),
        "validation": Split(2_000, 0.1e9),
    },
    training="training",
    evaluation="validation",
    demo="scenes",
    prepare="pipeline.tasks.segmentation.images:prepare",
    check="pipeline.data.segmentation_files:check",
    convert="pipeline.tasks.segmentation.images:convert",
    convert_code=("pipeline.data.convert:convert_segmentation_folder",),
    survey="pipeline.tasks.segmentation.survey:survey",
)
SEGMENTER = Task(
    name="segmenter",
    section="segmentation",
    data=ADE20K,
    names=lambda params: tuple(VARIANTS),
    train="pipeline.tasks.segmentation.training:train",
    evaluate="pipeline.tasks.segmentation.evaluation:evaluate",
    create="pipeline.models.semantic_fpn:create_segmenter",
    released="pipeline.models.released_weights:RELEASED_SEGMENTERS",
    metrics=(
        Metric("miou", "mIoU"),
        Metric("miou_aligned", "mIoU*"),
        Metric("miou_ms_flip", "mIoU ms+flip"),
        Metric("miou_aligned_ms_flip", "mIoU* ms+flip"),
        Metric("aacc", "Pixel accuracy"),
        Metric("macc", "Class accuracy"),
    ),
    evaluation_arguments=_evaluation_arguments,
    forward_gmacs=forward_gmacs,
    evaluation_gmacs=_evaluation_gmacs,
    parameters=_parameters,
    starts_from=CLASSIFIER,
    accumulates=lambda name: False,
    is_dense=True,
    evaluation_outputs={
        "iou.csv": "results/evaluate_segmenter/{name}.iou.csv",
        "pictures.npz": "results/evaluate_segmenter/{name}.pictures.npz",
        "predictions.parquet": "predictions/evaluate_segmenter/{name}.parquet",
    },
)
