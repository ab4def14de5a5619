"""Evaluation of one ADE20K segmenter, as a function that runs inside a job."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from pipeline import device as ranks
from pipeline import paths
from pipeline.cluster import Profile
from pipeline.config import SegmentationEvaluation, validate
from pipeline.data.segmentation import segmentation_eval_loader
from pipeline.metrics import ConfusionMatrix, count_macs, count_parameters
from pipeline.models.released_weights import load_released
from pipeline.models.semantic_fpn import create_segmenter
from pipeline.tasks.on_device import IGNORED_LABEL, normalise, resize_logits

PICTURES, PICTURE_PX = 4, 256
"""How many images, spread over the split, are kept with their prediction, and their longer side at most."""


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
    """mIoU over every image of `beton`, each once.

    Rank 0 writes `out/{metrics.json,iou.csv,pictures.npz}`, and each image's pixels by class:
    `out/predictions.parquet`.

    `miou` follows a plain resize, `miou_aligned` one to multiples of `size_divisor` (mmseg's mIoU and mIoU*);
    each with `_ms_flip` too where the settings name ratios. `images_per_s`, on a GPU only, is mmseg's: one image at a
    time through the model, reading and resizing not counted.
    """
    checked = validate(SegmentationEvaluation, settings, "evaluation.segmentation")
    model = create_segmenter(variant, num_classes)
    load_released(model, Path(weights))
    model.eval().to(world.device).to(memory_format=torch.channels_last)
    result: dict[str, Any] = {}
    pictures: dict[str, npt.NDArray[np.uint8]] = {}
    images: list[pd.DataFrame] = []
    kept: dict[str, Any]
    for name, size_divisor in (("miou", None), ("miou_aligned", checked.size_divisor)):
        kept = {} if size_divisor is None else {"pictures": pictures, "images": images}
        counts = _confusion(
            world, model, num_classes, Path(beton), checked, size_divisor, flip=False, ratios=[1.0], **kept
        )
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
        with paths.written_atomically(run_folder / "out/iou.csv") as temporary:
            per_class = pd.DataFrame({"label": range(num_classes), "iou": counts["iou_per_class"]})
            per_class.round(6).to_csv(temporary, index=False)
        with paths.written_atomically(run_folder / "out/pictures.npz") as temporary:
            np.savez_compressed(temporary, **pictures)  # type: ignore[arg-type]
        with paths.written_atomically(run_folder / "out/predictions.parquet") as temporary:
            pd.concat(images).sort_values(["sample_id", "class"], ignore_index=True).to_parquet(temporary)
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
    pictures: dict[str, npt.NDArray[np.uint8]] | None = None,
    images: list[pd.DataFrame] | None = None,
) -> dict[str, Any]:
    """Counts over all ranks.

    Into `pictures` go the images, labels and predictions to be shown, and into `images` each image's pixel counts by
    class, over all ranks.
    """
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
    shown = np.linspace(0, loader.reader.num_samples - 1, PICTURES).round().astype(int).tolist()
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
                # mmseg's two steps, to the input's size and then to the label's; it averages probabilities there.
                share = resize_logits(resize_logits(logits, pixels.shape[-2:]), labels.shape[-2:]).softmax(1)
                scores = scores + (share.flip(3) if mirrored else share)
        cells = matrix.update(scores.argmax(1), labels)
        if images is not None:
            images.append(_image_counts(int(batch.sample_ids), cells))
        if pictures is not None and (number := int(batch.sample_ids)) in shown:
            pictures |= _picture(number, batch.images[0], batch.labels, scores.argmax(1))
        totals[0] += len(labels)
    if world.size > 1:
        torch.distributed.all_reduce(totals)
    counted, forward_s = totals.tolist()
    expected = int(loader.reader.num_samples)
    if counted != expected:
        raise AssertionError(f"{counted:.0f} images counted, {expected} in {beton}")
    if pictures is not None and world.size > 1:
        parts: list[Any] = [None] * world.size
        torch.distributed.all_gather_object(parts, pictures)
        pictures.update({name: pixels for part in parts for name, pixels in part.items()})
    if images is not None and world.size > 1:
        tables: list[Any] = [None] * world.size
        torch.distributed.all_gather_object(tables, images)
        images[:] = [table for rank in tables for table in rank]
    per_class = matrix.iou_per_class().tolist()
    return {**matrix.compute(), "images": counted, "forward_s": forward_s, "iou_per_class": per_class}


def _image_counts(sample_id: int, cells: Tensor) -> pd.DataFrame:
    """One image's pixels by class, of the classes that it shows or was taken to show."""
    counts = torch.stack([cells.diagonal(), cells.sum(1), cells.sum(0)], dim=1).cpu().numpy()
    table = pd.DataFrame(counts, columns=["correct", "labelled", "predicted"]).rename_axis("class").reset_index()
    table.insert(0, "sample_id", sample_id)
    return table[table["labelled"] + table["predicted"] > 0]


def _picture(number: int, image: Tensor, labels: Tensor, predicted: Tensor) -> dict[str, npt.NDArray[np.uint8]]:
    """One image `(h, w, 3)` with its labels and prediction `(h, w)`, small enough for a page."""
    height, width = labels.shape[-2:]
    shrink = min(1.0, PICTURE_PX / max(height, width))
    size = (round(height * shrink), round(width * shrink))
    pixels = nn.functional.interpolate(image.float(), size, mode="bilinear", antialias=True).round().byte()
    masks = [nn.functional.interpolate(mask[None].float(), size)[0, 0].byte() for mask in (labels, predicted)]
    named = zip(("image", "label", "prediction"), (pixels[0].permute(1, 2, 0), *masks), strict=True)
    return {f"{name}_{number:05d}": tensor.cpu().numpy() for name, tensor in named}


def _device_clock(world: ranks.World) -> float:
    """Seconds, when the device has done what it was given."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter()
