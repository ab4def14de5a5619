"""mIoU over a whole data set, as mmsegmentation's IoUMetric defines it."""

import torch
from torch import Tensor
from torch import distributed as dist


class ConfusionMatrix:
    """Counts pixels by (label, prediction); those labelled `ignore_index` do not count."""

    def __init__(self, num_classes: int, ignore_index: int = 255, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        """This rank's pixels `(C, C)`, int64: row = label, column = prediction."""

    @torch.no_grad()
    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add predictions in [0, C) and labels in [0, C) or `ignore_index`: integers, same shape.

        Raises ValueError for another shape or for a value out of range.
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
