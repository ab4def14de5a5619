"""Evaluation of one ablation of Table 5 as a job."""

from pathlib import Path

from pipeline import device as ranks
from pipeline.cluster import Profile
from pipeline.config import Precision
from pipeline.models.ablations import create_ablation, load_ablation
from pipeline.tasks.classification.evaluation import ValidationSet, evaluate_model


def evaluate(
    world: ranks.World,
    run_folder: Path,
    profile: Profile,
    *,
    variant: str,
    ablation: str,
    image_size: int,
    crop_fraction: float,
    precision: Precision,
    num_classes: int,
    beton: str,
    weights: str,
) -> bool:
    """Count every image of `beton` once; rank 0 writes `out/metrics.json` and `out/predictions.parquet`."""
    model = create_ablation(ablation, num_classes, variant=variant, image_size=image_size)
    load_ablation(model, Path(weights))
    at_224_px = create_ablation(ablation, num_classes, variant=variant)
    images = ValidationSet(beton, image_size, crop_fraction, precision)
    return evaluate_model(model, at_224_px, images, world, run_folder, profile)
