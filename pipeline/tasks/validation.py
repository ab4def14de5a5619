"""A classifier's answers to the images of a .beton: for its evaluation, and for a look at it while it trains."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline import world as ranks
from pipeline.config import Precision
from pipeline.data.loaders import BatchLoader, eval_loader
from pipeline.metrics import ClassificationMeter
from pipeline.tasks.device_batch import normalise


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
    """The images of an evaluation and how a model sees them, there and when it is looked at while it trains."""

    beton: str
    image_size: int
    crop_fraction: float
    precision: Precision

    def loader(self, world: ranks.World, batch_size: int) -> BatchLoader:
        """The rank's share of the images."""
        return eval_loader(
            self.beton,
            batch_size=batch_size,
            workers=world.cpus,
            image_size=self.image_size,
            crop_fraction=self.crop_fraction,
            rank=world.rank,
            world_size=world.size,
        )

    @torch.no_grad()
    def measure(self, model: nn.Module, world: ranks.World, batch_size: int) -> dict[str, float]:
        """`top1`, `top5` (percent) and `val_loss` over the ranks' shares of all images: the same on all ranks."""
        meter = ClassificationMeter(world.device)
        model.eval()
        for _, logits, labels in predict(model, self.loader(world, batch_size), world, self.precision):
            meter.update(logits, labels)
        model.train()
        counts = meter.compute()
        return {"top1": counts["top1"], "top5": counts["top5"], "val_loss": counts["loss"]}
