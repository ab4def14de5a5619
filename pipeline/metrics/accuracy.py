"""Top-1, top-5 and cross-entropy over a set of images, whatever the batches and ranks."""

import torch
from torch import Tensor, nn
from torch import distributed as dist


class ClassificationMeter:
    """Adds up correct answers and losses; nothing is averaged before the end.

    With fewer than five classes "top-5" is top-C, and so 100 %.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        # float64 counts exactly up to 2^53: correct in top 1, in top 5, cross-entropy, images.
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add logits `(B, C)`, floating point, and labels `(B,)`, int64 in [0, C).

        Every row counts: leave padding out before calling.
        """
        logits = logits.float()
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = ranked == labels.unsqueeze(1)
        loss = nn.functional.cross_entropy(logits, labels, reduction="none").double().sum()
        images = torch.full_like(loss, len(labels))
        self._sums += torch.stack([hits[:, 0].sum(), hits.sum(), loss, images])

    def compute(self) -> dict[str, float]:
        """`top1`, `top5` in percent, `loss` (mean cross-entropy, nats), `images`, over all ranks.

        A collective call: when torch.distributed is initialised every rank makes it, and every
        rank gets the same numbers. Raises ValueError if no image was counted.
        """
        sums = self._sums.clone()
        if dist.is_initialized():
            dist.all_reduce(sums)
        top1, top5, loss, images = sums.tolist()
        if images == 0:
            raise ValueError("no image was counted: update the meter before computing")
        return {
            "top1": 100 * top1 / images,
            "top5": 100 * top5 / images,
            "loss": loss / images,
            "images": int(images),
        }
