"""Accuracy, mIoU and the counters, against other implementations and by hand."""

import math
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as mp
from torch import nn
from torchmetrics import JaccardIndex
from torchmetrics.classification import MulticlassAccuracy

from pipeline.metrics import ClassificationMeter, ConfusionMatrix, count_macs, count_parameters
from pipeline.models import create_classifier, create_segmenter


def classified(images: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, classes, generator=generator)
    return logits, torch.randint(classes, (images,), generator=generator)


def masks(classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (3, 17, 23), generator=generator)
    noise = torch.randint(classes, (3, 17, 23), generator=generator)
    right = torch.rand(labels.shape, generator=generator) < 0.6
    predictions = torch.where(right, labels, noise)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    return predictions, labels


def test_accuracy_by_hand() -> None:
    meter = ClassificationMeter()
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4]])
    meter.update(logits, torch.tensor([0, 4, 5]))  # first, fifth and sixth place
    result = meter.compute()
    assert result["top1"] == pytest.approx(100 / 3)
    assert result["top5"] == pytest.approx(200 / 3)
    losses = [math.log(sum(math.exp(-i) for i in range(6))) + place for place in (0, 4, 5)]
    assert result["loss"] == pytest.approx(sum(losses) / 3)
    assert result["images"] == 3


def test_accuracy_agrees_with_torchmetrics_however_the_batches_fall() -> None:
    logits, labels = classified(101, 20)
    meter = ClassificationMeter()
    for part in (slice(0, 64), slice(64, 100), slice(100, 101)):
        meter.update(logits[part], labels[part])
    result = meter.compute()
    for name, k in (("top1", 1), ("top5", 5)):
        other = MulticlassAccuracy(20, top_k=k, average="micro")(logits, labels).item()
        assert result[name] == pytest.approx(100 * other)
    assert result["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item())
    assert result["images"] == 101


def test_top5_of_three_classes_is_always_right() -> None:
    logits, labels = classified(10, 3)
    meter = ClassificationMeter()
    meter.update(logits.bfloat16(), labels)
    assert meter.compute()["top5"] == 100


def test_no_image_is_an_error() -> None:
    with pytest.raises(ValueError, match="no image was counted"):
        ClassificationMeter().compute()


@pytest.mark.parametrize(("classes", "seed"), [(2, 0), (11, 1), (150, 2), (150, 3)])
def test_miou_agrees_with_torchmetrics(classes: int, seed: int) -> None:
    predictions, labels = masks(classes, seed)
    if classes == 150:  # one class nowhere, one only predicted, one only labelled
        predictions[predictions == 7], labels[labels == 7] = 8, 8
        labels[labels == 9], predictions[predictions == 10] = 8, 8
    matrix = ConfusionMatrix(classes)
    for prediction, label in zip(predictions, labels, strict=True):
        matrix.update(prediction, label)
    result = matrix.compute()
    per_class = JaccardIndex("multiclass", num_classes=classes, ignore_index=255, average="none")
    mean = JaccardIndex("multiclass", num_classes=classes, ignore_index=255, average="macro")
    everywhere = MulticlassAccuracy(classes, ignore_index=255, average="micro")
    assert result["mIoU"] == pytest.approx(100 * mean(predictions, labels).item(), abs=1e-4)
    assert result["aAcc"] == pytest.approx(100 * everywhere(predictions, labels).item(), abs=1e-4)
    ours = matrix.iou_per_class()
    torch.testing.assert_close(ours.nan_to_num(), 100 * per_class(predictions, labels).double(), atol=1e-4, rtol=0)
    assert ours.isnan().nonzero().flatten().tolist() == ([7] if classes == 150 else [])


def test_segmentation_by_hand() -> None:
    matrix = ConfusionMatrix(4)
    labels = torch.tensor([[0, 0, 1, 255]], dtype=torch.uint8)
    matrix.update(torch.tensor([[0, 1, 2, 3]]), labels)
    # IoU: class 0 1/2, class 1 0/2, class 2 (only predicted) 0/1, class 3 nowhere
    result = matrix.compute()
    assert result["mIoU"] == pytest.approx(100 * (0.5 + 0 + 0) / 3)
    assert result["aAcc"] == pytest.approx(100 / 3)
    assert result["mAcc"] == pytest.approx(100 * (0.5 + 0) / 2)
    assert matrix.counts.sum() == 3


def test_bad_masks_are_refused() -> None:
    matrix = ConfusionMatrix(4)
    with pytest.raises(ValueError, match="labels range from 0 to 150, with 4 classes"):
        matrix.update(torch.zeros(2, 2), torch.tensor([[0, 150], [255, 1]]))
    with pytest.raises(ValueError, match="resize the logits"):
        matrix.update(torch.zeros(2, 2), torch.zeros(4, 4))
    assert matrix.counts.sum() == 0


def two_ranks(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    logits, labels = classified(101, 20)
    predictions, truth = masks(11, 1)
    meter, matrix = ClassificationMeter(), ConfusionMatrix(11)
    meter.update(logits[rank::2], labels[rank::2])
    matrix.update(predictions[rank::2], truth[rank::2])
    results = [meter.compute(), matrix.compute(), meter.compute(), matrix.compute()]
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_give_what_one_gives(tmp_path: Path) -> None:
    mp.spawn(two_ranks, (tmp_path,), nprocs=2)
    meter, matrix = ClassificationMeter(), ConfusionMatrix(11)
    meter.update(*classified(101, 20))
    matrix.update(*masks(11, 1))
    one = [meter.compute(), matrix.compute()]
    for rank in range(2):
        for result, expected in zip(torch.load(tmp_path / f"{rank}.pt"), one * 2, strict=True):
            assert result == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("variant", "macs_g"),
    [
        ("poolformer_s12", 1.8),
        ("poolformer_s24", 3.4),
        ("poolformer_s36", 5.0),
        ("poolformer_m36", 8.8),
        ("poolformer_m48", 11.6),
    ],
)
def test_macs_round_to_the_papers(
    variant: str, macs_g: float, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    model = create_classifier(variant).train()
    assert round(count_macs(model, 224) / 1e9, 1) == macs_g
    assert model.training
    assert not caplog.records
    assert not recwarn.list


def test_macs_of_a_segmenter() -> None:
    # S12: 9.31 G in the backbone (its 1.8 at 224, times (512 / 224)^2, norms included), the rest
    # in the pyramid and the head.
    assert count_macs(create_segmenter("poolformer_s12"), 512) / 1e9 == pytest.approx(31.0, abs=0.1)


def test_counters_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5))
    assert count_parameters(model) == 3 * 5 * 9 + 5 + 2 * 5
    assert count_macs(nn.Sequential(model[0]), 8) == 3 * 5 * 9 * 64
