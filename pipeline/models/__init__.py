"""PoolFormer classifiers, Semantic FPN segmenters, and the files that hold their weights."""

from pipeline.models.poolformer import create_classifier
from pipeline.models.released_weights import RELEASED_CLASSIFIERS, RELEASED_SEGMENTERS, find_released, load_released
from pipeline.models.semantic_fpn import create_segmenter
from pipeline.variants import VARIANTS, Variant

__all__ = [
    "RELEASED_CLASSIFIERS",
    "RELEASED_SEGMENTERS",
    "VARIANTS",
    "Variant",
    "create_classifier",
    "create_segmenter",
    "find_released",
    "load_released",
]
