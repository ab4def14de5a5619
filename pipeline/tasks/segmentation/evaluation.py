"""Evaluation of one ADE20K segmenter, as a function that runs inside a job."""

import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from pipeline import device as ranks
from pipeline import paths
from pipeline.cluster import Profile
from pipeline.config import SegmentationEvaluation, validate
from pipeline.data.segmentation import SegmentationEvalBatch, segmentation_eval_loader
from pipeline.metrics import ConfusionMatrix, count_macs, count_parameters
from pipeline.models.released_weights import load_released
from pipeline.models.semantic_fpn import create_segmenter
from pipeline.tasks.on_device import IGNORED_LABEL, normalise, resize_logits
from pipeline.tasks.partial import Partial

log = logging.getLogger(__name__)
PICTURES, PICTURE_PX = 4, 256
"""How many images, spread over the split, are kept with their prediction, and their longer side at most."""
DETAILED = "miou_aligned"
"""The pass whose pictures and counts of each image are kept."""


@dataclass(frozen=True)
class _Pass:
    """One way of looking at every image."""

    name: str
    size_divisor: int | None
    ratios: tuple[float, ...] = (1.0,)
    flip: bool = False


def _passes(settings: SegmentationEvaluation) -> list[_Pass]:
    found = []
    for name, size_divisor in (("miou", None), (DETAILED, settings.size_divisor)):
        found.append(_Pass(name, size_divisor))
        if settings.multi_scale_ratios:
            found.append(_Pass(f"{name}_ms_flip", size_divisor, tuple(settings.multi_scale_ratios), flip=True))
    return found


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

    False if it was told to stop; the next call goes on from there.
    """
    checked = validate(SegmentationEvaluation, settings, "evaluation.segmentation")
    model = create_segmenter(variant, num_classes)
    load_released(model, Path(weights))
    model.eval().to(world.device).to(memory_format=torch.channels_last)
    result: dict[str, Any] = {}
    partial = Partial(run_folder, world, profile.checkpoint_interval_s)
    kept, shares = partial.load(), dict[str, _Share]()

    def state() -> dict[str, Any]:
        return {name: share.state() for name, share in shares.items()}

    for each in _passes(checked):
        share = shares[each.name] = _Share.of(kept.get(each.name), num_classes, world.device)
        loader = segmentation_eval_loader(
            beton,
            workers=world.cpus,
            scale=checked.scale,
            size_divisor=each.size_divisor,
            ratios=each.ratios,
            rank=world.rank,
            world_size=world.size,
            first=share.done,
        )
        shown = np.linspace(0, loader.reader.num_samples - 1, PICTURES).round().astype(int).tolist()
        for batch in loader:
            labels = batch.labels.to(world.device)
            scores = _scores(model, batch, each, checked, world, share.totals)
            cells = share.matrix.update(scores.argmax(1), labels)
            if each.name == DETAILED:
                share.images.append(_image_counts(int(batch.sample_ids), cells))
                if (number := int(batch.sample_ids)) in shown:
                    share.pictures |= _picture(number, batch.images[0], batch.labels, scores.argmax(1))
            share.totals[0] += len(labels)
            if partial.asks_to_stop(state):
                break
        if not partial.all_finished(state):
            return False
        over_all = share.over_all_ranks(world)
        if over_all["images"] != (expected := int(loader.reader.num_samples)):
            raise AssertionError(f"{over_all['images']:.0f} images counted, {expected} in {beton}")
        result[each.name] = over_all["mIoU"]
        if each.name == DETAILED:
            counts = over_all
    pictures, images = world.gather(shares[DETAILED].pictures), world.gather(shares[DETAILED].images)
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
            shown = {name: pixels for each in pictures for name, pixels in each.items()}
            np.savez_compressed(temporary, **{name: pixels.numpy() for name, pixels in shown.items()})
        with paths.written_atomically(run_folder / "out/predictions.parquet") as temporary:
            pd.concat(table for each in images for table in each).sort_values(
                ["sample_id", "class"], ignore_index=True
            ).to_parquet(temporary)
    return True


@dataclass
class _Share:
    """What this rank has counted in one pass over the images."""

    matrix: ConfusionMatrix
    totals: Tensor
    """Images, and seconds in the model: `(2,)` float64."""
    pictures: dict[str, Tensor] = field(default_factory=dict)
    """Images, labels and predictions to be shown: uint8."""
    images: list[pd.DataFrame] = field(default_factory=list)
    """Each image's pixel counts by class."""

    @classmethod
    def of(cls, kept: dict[str, Any] | None, num_classes: int, device: torch.device) -> "_Share":
        """What `state` gave, or an empty one."""
        share = cls(
            ConfusionMatrix(num_classes, IGNORED_LABEL, device), torch.zeros(2, dtype=torch.float64, device=device)
        )
        if kept is not None:
            share.matrix.counts += kept["counts"]
            share.totals += kept["totals"]
            share.pictures = {name: pixels.cpu() for name, pixels in kept["pictures"].items()}
            share.images = [pd.DataFrame(kept["images"])]
            log.info("going on after %d images of this rank", share.done)
        return share

    def state(self) -> dict[str, Any]:
        images = pd.concat(self.images).to_dict("list") if self.images else {}
        return {"counts": self.matrix.counts, "totals": self.totals, "pictures": self.pictures, "images": images}

    @property
    def done(self) -> int:
        return int(self.totals[0])

    def over_all_ranks(self, world: ranks.World) -> dict[str, Any]:
        """A collective call."""
        totals = self.totals.clone()
        if world.size > 1:
            torch.distributed.all_reduce(totals)
        counted, forward_s = totals.tolist()
        per_class = self.matrix.iou_per_class().tolist()
        return {**self.matrix.compute(), "images": counted, "forward_s": forward_s, "iou_per_class": per_class}


def _scores(
    model: nn.Module,
    batch: SegmentationEvalBatch,
    each: _Pass,
    settings: SegmentationEvaluation,
    world: ranks.World,
    totals: Tensor,
) -> Tensor:
    """Probabilities `(1, C, H, W)` added up over a pass's ratios and flips; adds the model's seconds to `totals`."""
    scores = torch.zeros((), device=world.device)
    for image in batch.images:
        pixels = normalise(image.to(world.device))
        for mirrored in (False, True) if each.flip else (False,):
            started = _device_clock(world)
            with ranks.autocast(world.device, settings.precision):
                logits = model(pixels.flip(3) if mirrored else pixels)
            totals[1] += _device_clock(world) - started
            # mmseg's two steps, to the input's size and then to the label's; it averages probabilities there.
            share = resize_logits(resize_logits(logits, pixels.shape[-2:]), batch.labels.shape[-2:]).softmax(1)
            scores = scores + (share.flip(3) if mirrored else share)
    return scores


def _image_counts(sample_id: int, cells: Tensor) -> pd.DataFrame:
    """One image's pixels by class, of the classes that it shows or was taken to show."""
    counts = torch.stack([cells.diagonal(), cells.sum(1), cells.sum(0)], dim=1).cpu().numpy()
    table = pd.DataFrame(counts, columns=["correct", "labelled", "predicted"]).rename_axis("class").reset_index()
    table.insert(0, "sample_id", sample_id)
    return table[table["labelled"] + table["predicted"] > 0]


def _picture(number: int, image: Tensor, labels: Tensor, predicted: Tensor) -> dict[str, Tensor]:
    """One image `(h, w, 3)` with its labels and prediction `(h, w)`, small enough for a page."""
    height, width = labels.shape[-2:]
    shrink = min(1.0, PICTURE_PX / max(height, width))
    size = (round(height * shrink), round(width * shrink))
    pixels = nn.functional.interpolate(image.float(), size, mode="bilinear", antialias=True).round().byte()
    masks = [nn.functional.interpolate(mask[None].float(), size)[0, 0].byte() for mask in (labels, predicted)]
    named = zip(("image", "label", "prediction"), (pixels[0].permute(1, 2, 0), *masks), strict=True)
    return {f"{name}_{number:05d}": tensor.cpu() for name, tensor in named}


def _device_clock(world: ranks.World) -> float:
    """Seconds, when the device has done what it was given."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter()
