"""PoolFormer classifiers, the ablations of Table 5, Semantic FPN segmenters, and the files that hold their weights.

What is imported from here is for people and other programs. The tasks import the modules themselves, so that what
changes for one of them does not count as a change of another's code (docs/identity.md).
"""

from pathlib import Path
from typing import TypeVar

from pipeline.ablations import ABLATIONS
from pipeline.models import poolformer, released_weights
from pipeline.models.ablations import RELEASED_ABLATIONS, AblatedClassifier, create_ablation, load_ablation
from pipeline.models.poolformer import PoolFormerClassifier
from pipeline.models.released_weights import RELEASED_CLASSIFIERS, RELEASED_SEGMENTERS, find_released
from pipeline.models.semantic_fpn import SemanticFPN, create_segmenter
from pipeline.variants import VARIANTS, Variant

__all__ = [
    "ABLATIONS",
    "RELEASED_ABLATIONS",
    "RELEASED_CLASSIFIERS",
    "RELEASED_SEGMENTERS",
    "VARIANTS",
    "Variant",
    "create_classifier",
    "create_segmenter",
    "find_released",
    "load_released",
]

ModelT = TypeVar("ModelT", bound=PoolFormerClassifier | AblatedClassifier | SemanticFPN)


def create_classifier(
    variant: str,
    num_classes: int = 1000,
    drop_path_rate: float | None = None,
    ablation: str | None = None,
    image_size: int = 224,
) -> PoolFormerClassifier | AblatedClassifier:
    """A freshly initialised PoolFormer, or one with a change of Table 5; a function of `torch.manual_seed`.

    Args:
        variant: a key of VARIANTS.
        num_classes: of the head.
        drop_path_rate: the last block's, in [0, 1); None takes the paper's for the variant.
        ablation: a key of ABLATIONS, or None.
        image_size: pixels; matters to ablations that are made for images of one size.

    Raises:
        UserError: an unknown variant or ablation.
    """
    if ablation is None:
        return poolformer.create_classifier(variant, num_classes, drop_path_rate)
    return create_ablation(ablation, num_classes, drop_path_rate, variant=variant, image_size=image_size)


def load_released(model: ModelT, path: Path | str) -> ModelT:
    """Load a file into a model of this package, strictly, and return the model.

    See `released_weights.load_released` and `ablations.load_ablation` for the files that each takes.

    Raises:
        UserError: it is missing, damaged, not such a file, or does not fit; the message names it.
    """
    if isinstance(model, AblatedClassifier):
        load_ablation(model, path)
    else:
        released_weights.load_released(model, path)
    return model
