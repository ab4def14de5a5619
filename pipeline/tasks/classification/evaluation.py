"""Evaluation of an ImageNet classifier as a job, and the validation passes while one trains."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline import device as ranks
from pipeline import paths
from pipeline.cluster import Profile
from pipeline.config import Precision
from pipeline.data.loaders import BatchLoader, eval_loader
from pipeline.data.manifest import read_manifest
from pipeline.errors import UserError
from pipeline.metrics import ClassificationMeter, count_macs, count_parameters
from pipeline.models.poolformer import create_classifier
from pipeline.models.released_weights import load_released
from pipeline.tasks.classification.test_sets import real_accuracy
from pipeline.tasks.on_device import normalise
from pipeline.tasks.partial import Partial

log = logging.getLogger(__name__)


def predict(
    model: nn.Module, loader: BatchLoader, world: ranks.World, precision: Precision
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Sample ids, logits `(B, C)` in float32, and labels of each batch."""
    for batch in loader:
        with ranks.autocast(world.device, precision):
            logits = model(normalise(batch.images.to(world.device))).float()
        yield batch.sample_ids, logits, batch.labels.to(world.device)


@dataclass(frozen=True)
class ValidationSet:
    """The images of an evaluation and how they are prepared, there and in the validation passes of a training."""

    beton: str
    image_size: int
    crop_fraction: float
    precision: Precision

    def loader(self, world: ranks.World, batch_size: int, first: int = 0) -> BatchLoader:
        """The rank's share of the images, from its image `first` on."""
        return eval_loader(
            self.beton,
            batch_size=batch_size,
            workers=world.cpus,
            image_size=self.image_size,
            crop_fraction=self.crop_fraction,
            rank=world.rank,
            world_size=world.size,
            first=first,
        )

    @torch.no_grad()
    def measure(self, model: nn.Module, world: ranks.World, batch_size: int) -> dict[str, float] | None:
        """`top1`, `top5` (percent) and `val_loss` over the ranks' shares of all images: the same on all ranks.

        Empty, with a warning, where a rank cannot read the images: a training does not depend on them. None where a
        rank has to stop.
        """
        meter = ClassificationMeter(world.device)
        failed = stopped = False
        model.eval()
        try:
            for _, logits, labels in predict(model, self.loader(world, batch_size), world, self.precision):
                meter.update(logits, labels)
                if stopped := world.should_stop():
                    break
        except (UserError, OSError) as error:
            log.warning("no validation pass, training continues: %s", error)
            failed = True
        model.train()
        votes = torch.tensor([float(failed), float(stopped)], device=world.device)
        if world.size > 1:
            dist.all_reduce(votes)
        if votes[1]:
            return None
        if votes[0]:
            return {}
        counts = meter.compute()
        return {"top1": counts["top1"], "top5": counts["top5"], "val_loss": counts["loss"]}


def evaluate(
    world: ranks.World,
    run_folder: Path,
    profile: Profile,
    *,
    variant: str,
    image_size: int,
    crop_fraction: float,
    precision: Precision,
    num_classes: int,
    beton: str,
    weights: str,
    classes: list[int] | None = None,
) -> bool:
    """Count every image of `beton` once; rank 0 writes `out/metrics.json` and `out/predictions.parquet`.

    `classes` are the model's outputs that the labels of `beton` stand for, the only ones to choose from; None: all.
    """
    model = create_classifier(variant, num_classes)
    load_released(model, Path(weights))
    images = ValidationSet(beton, image_size, crop_fraction, precision)
    return evaluate_model(model, model, images, world, run_folder, profile, classes)


@torch.inference_mode()
def evaluate_model(
    model: nn.Module,
    counted: nn.Module,
    images: ValidationSet,
    world: ranks.World,
    run_folder: Path,
    profile: Profile,
    classes: list[int] | None = None,
) -> bool:
    """As `evaluate`, of a model with its weights; `counted` is the same for images of 224 px, for its multiply-adds.

    False if it was told to stop; the next call goes on from there.
    """
    model.eval().to(world.device).to(memory_format=torch.channels_last)
    meter = ClassificationMeter(world.device)
    rows: list[pd.DataFrame] = []
    partial = Partial(run_folder, world, profile.checkpoint_interval_s)
    if kept := partial.load():
        meter.sums += kept["sums"]
        rows.append(pd.DataFrame(kept["rows"]))
        log.info("going on after %d images of this rank", len(rows[0]))

    def state() -> dict[str, Any]:
        return {"sums": meter.sums, "rows": pd.concat(rows).to_dict("list") if rows else {}}

    beton = images.beton
    loader = images.loader(world, profile.max_images_per_device, first=sum(map(len, rows)))
    chosen = slice(None) if classes is None else torch.tensor(classes).to(world.device)
    for sample_ids, outputs, labels in predict(model, loader, world, images.precision):
        logits = outputs[:, chosen]
        meter.update(logits, labels)
        rows.append(_prediction_rows(sample_ids, logits, labels))
        if partial.asks_to_stop(state):
            break
    if not partial.all_finished(state):
        return False
    counts = meter.compute()
    expected = int(loader.reader.num_samples)
    if counts["images"] != expected:
        raise AssertionError(f"{counts['images']} images counted, {expected} in {beton}")
    predictions = pd.concat(world.gather(pd.concat(rows) if rows else pd.DataFrame()))
    if world.is_first:
        table = predictions.sort_values("sample_id", ignore_index=True)
        if table["sample_id"].tolist() != list(range(expected)):
            raise AssertionError(f"{beton}: an image was predicted twice or not at all")
        with paths.written_atomically(run_folder / "out/predictions.parquet") as temporary:
            table.to_parquet(temporary)
        real = real_accuracy(_file_names(Path(beton)), table["predicted"].tolist()) if classes is None else {}
        result = {**counts, **real, "parameters": count_parameters(model), "macs_g": count_macs(counted, 224) / 1e9}
        with paths.written_atomically(run_folder / "out/metrics.json") as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n")
    return True


def _file_names(beton: Path) -> list[str]:
    return [Path(row.path).name for row in read_manifest(beton)]


def _prediction_rows(sample_ids: Tensor, logits: Tensor, labels: Tensor) -> pd.DataFrame:
    top = logits.softmax(1).topk(min(5, logits.shape[1]))
    return pd.DataFrame(
        {
            "sample_id": sample_ids.tolist(),
            "label": labels.tolist(),
            "predicted": top.indices.tolist(),
            "probability": top.values.tolist(),
        }
    )
