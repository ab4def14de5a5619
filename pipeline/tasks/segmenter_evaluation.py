"""Evaluation of one ADE20K segmenter, as a function that runs inside a job."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline import paths
from pipeline import world as ranks
from pipeline.cluster import Profile
from pipeline.config import SegmentationEvaluation, validate
from pipeline.data.segmentation import segmentation_eval_loader
from pipeline.metrics import ConfusionMatrix, count_macs, count_parameters
from pipeline.models import create_segmenter, load_released
from pipeline.tasks.device_batch import IGNORED_LABEL, normalise, resize_logits


@torch.inference_mode()
def evaluate(
    world: ranks.World,
    run_folder: Path,
    profile: Profile,
    *,
    variant: str,
    settings: dict[str, Any],
    num_classes: int,
    beton: str,
    weights: str,
) -> bool:
    """mIoU over every image of `beton`, each once; rank 0 writes `out/metrics.json`.

    `miou` follows a plain resize, `miou_aligned` one to multiples of `size_divisor` (mmseg's mIoU and mIoU*);
    each with `_ms_flip` too where the settings name ratios. `images_per_s`, on a GPU only, is mmseg's: one image at a
    time through the model, reading and resizing not counted.
    """
    checked = validate(SegmentationEvaluation, settings, "evaluation.segmentation")
    model = create_segmenter(variant, num_classes)
    load_released(model, Path(weights))
    model.eval().to(world.device).to(memory_format=torch.channels_last)
    result: dict[str, Any] = {}
    for name, size_divisor in (("miou", None), ("miou_aligned", checked.size_divisor)):
        counts = _confusion(world, model, num_classes, Path(beton), checked, size_divisor, flip=False, ratios=[1.0])
        result[name] = counts["mIoU"]
        if checked.multi_scale_ratios:
            ratios = checked.multi_scale_ratios
            many = _confusion(world, model, num_classes, Path(beton), checked, size_divisor, flip=True, ratios=ratios)
            result[f"{name}_ms_flip"] = many["mIoU"]
    if world.device.type == "cuda":
        result["images_per_s"] = counts["images"] / counts["forward_s"]
    result |= {"aacc": counts["aAcc"], "macc": counts["mAcc"], "images": int(counts["images"])}
    result |= {"parameters": count_parameters(model), "macs_g": count_macs(model, 512) / 1e9}
    if world.is_first:
        with paths.written_atomically(run_folder / "out/metrics.json") as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n")
    return True


def _confusion(
    world: ranks.World,
    model: nn.Module,
    num_classes: int,
    beton: Path,
    settings: SegmentationEvaluation,
    size_divisor: int | None,
    *,
    flip: bool,
    ratios: list[float],
) -> dict[str, float]:
    matrix = ConfusionMatrix(num_classes, IGNORED_LABEL, world.device)
    totals = torch.zeros(2, dtype=torch.float64, device=world.device)  # images, seconds in the model
    loader = segmentation_eval_loader(
        beton,
        workers=world.cpus,
        scale=settings.scale,
        size_divisor=size_divisor,
        ratios=ratios,
        rank=world.rank,
        world_size=world.size,
    )
    for batch in loader:
        labels = batch.labels.to(world.device)
        scores = torch.zeros((), device=world.device)
        for image in batch.images:
            pixels = normalise(image.to(world.device))
            for mirrored in (False, True) if flip else (False,):
                started = _device_clock(world)
                with ranks.autocast(world.device, settings.precision):
                    logits = model(pixels.flip(3) if mirrored else pixels)
                totals[1] += _device_clock(world) - started
                # mmseg averages probabilities at the label's size.
                share = resize_logits(logits, labels.shape[-2:]).softmax(1)
                scores = scores + (share.flip(3) if mirrored else share)
        matrix.update(scores.argmax(1), labels)
        totals[0] += len(labels)
    if world.size > 1:
        torch.distributed.all_reduce(totals)
    images, forward_s = totals.tolist()
    expected = int(loader.reader.num_samples)
    if images != expected:
        raise AssertionError(f"{images:.0f} images counted, {expected} in {beton}")
    return {**matrix.compute(), "images": images, "forward_s": forward_s}


def _device_clock(world: ranks.World) -> float:
    """Seconds, when the device has done what it was given."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter()
