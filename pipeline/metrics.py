"""What is measured: accuracy, mIoU, parameters and multiply-adds, whatever the batches and ranks."""

import warnings

import torch
from torch import Tensor, nn
from torch import distributed as dist


class ClassificationMeter:
    """Adds up correct answers and losses; nothing is averaged before the end.

    With fewer than five classes "top-5" is top-C, and so 100 %.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        # float64 counts exactly up to 2^53: correct in top 1, in top 5, cross-entropy, images.
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        """This rank's `(4,)`, float64."""

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
        self.sums += torch.stack([hits[:, 0].sum(), hits.sum(), loss, images])

    def compute(self) -> dict[str, float]:
        """`top1`, `top5` in percent, `loss` (mean cross-entropy, nats), `images`, over all ranks.

        A collective call: when torch.distributed is initialised every rank makes it, and every
        rank gets the same numbers. Raises ValueError if no image was counted.
        """
        sums = self.sums.clone()
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


class ConfusionMatrix:
    """Counts pixels by (label, prediction); those labelled `ignore_index` do not count."""

    def __init__(self, num_classes: int, ignore_index: int = 255, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        """This rank's pixels `(C, C)`, int64: row = label, column = prediction."""

    @torch.no_grad()
    def update(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """Add predictions in [0, C) and labels in [0, C) or `ignore_index`: integers, same shape.

        Returns the added pixels `(C, C)`, int64. Raises ValueError for another shape or for a value out of range.
        """
        if predictions.shape != labels.shape:
            raise ValueError(
                f"predictions {tuple(predictions.shape)} and labels {tuple(labels.shape)} differ "
                "in shape: resize the logits to the label's size first"
            )
        counted = labels != self.ignore_index
        rows, columns = labels[counted].long(), predictions[counted].long()
        for name, values in (("label", rows), ("prediction", columns)):
            if values.numel() and not 0 <= values.min() <= values.max() < self.num_classes:
                raise ValueError(
                    f"{name}s range from {values.min()} to {values.max()}, with {self.num_classes} "
                    f"classes and ignore_index {self.ignore_index}"
                )
        cells = torch.bincount(rows * self.num_classes + columns, minlength=self.num_classes**2)
        self.counts += cells.view_as(self.counts)
        return cells.view_as(self.counts)

    def compute(self) -> dict[str, float]:
        """`mIoU`, `aAcc` and `mAcc` in percent, unrounded, over the pixels of all ranks.

        mIoU leaves out a class that is neither in a label nor in a prediction, mAcc one that is in
        no label (mmseg's nanmean over 0/0); a class that is only predicted has IoU 0. Everything is
        NaN if no pixel was counted. A collective call, as `iou_per_class` is.
        """
        counts = self._all_ranks().double()
        correct, labelled = counts.diagonal(), counts.sum(1)
        return {
            "mIoU": 100 * intersection_over_union(counts).nanmean().item(),
            "aAcc": 100 * (correct.sum() / labelled.sum()).item(),
            "mAcc": 100 * (correct / labelled).nanmean().item(),
        }

    def iou_per_class(self) -> Tensor:
        """`(C,)` float64 in percent, NaN for a class in neither the labels nor the predictions."""
        return 100 * intersection_over_union(self._all_ranks().double())

    def _all_ranks(self) -> Tensor:
        counts = self.counts.clone()
        if dist.is_initialized():
            dist.all_reduce(counts)
        return counts


def intersection_over_union(counts: Tensor) -> Tensor:
    """Fraction `(C,)` from pixel counts `(C, C)`; 0/0 is NaN."""
    correct = counts.diagonal()
    return correct / (counts.sum(0) + counts.sum(1) - correct)


def count_parameters(model: nn.Module) -> int:
    """Trained values: every parameter once, no buffer."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, image_size: int) -> int:
    """Multiply-adds of one forward pass over one `(1, 3, image_size, image_size)` image.

    A multiply-add counts once. fvcore adds norms and bilinear upsampling by its own rules and
    leaves out pooling and elementwise operations; the official code's count, by its script
    misc/mac_count_with_fvcore.py, is the same. The model may be in training mode and stays so.
    """
    weight = next(model.parameters())
    image = torch.zeros(1, 3, image_size, image_size, dtype=weight.dtype, device=weight.device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # On import fvcore warns of what torch deprecated, and its tracer of every constant.
            warnings.simplefilter("ignore")
            from fvcore.nn import FlopCountAnalysis

            analysis = FlopCountAnalysis(model, image)
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            return int(analysis.total())
    finally:
        model.train(training)
