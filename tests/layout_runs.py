"""The two real trainings on small real data, on any layout.

`python tests/layout_runs.py FOLDER` measures the table of docs/layouts.md (20 minutes on two cores).
"""

import hashlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from rank_pool import rank_pool
from sklearn.datasets import load_sample_images
from torch import Tensor

from pipeline import device as ranks
from pipeline.cluster import split
from pipeline.config import ClassificationRecipe, SegmentationRecipe
from pipeline.data import convert_image_folder, convert_segmentation_folder
from pipeline.models import create_classifier
from pipeline.tasks.classification.fine_tuning import FineTuning
from pipeline.tasks.classification.training import ClassificationTask
from pipeline.tasks.segmentation.training import SegmentationTask
from pipeline.train import checkpoint
from pipeline.train.loop import train
from pipeline.train.task import Step, Task

CLASSES = 5
NUM_IMAGES, NUM_SCENES = 260, 30
CLASSIFICATION = ClassificationRecipe(
    image_size=32,
    global_batch_size=16,
    epochs=3,
    cooldown_epochs=0,
    warmup_epochs=1,
    max_steps=20,
    learning_rate_per_1024=6.4e-2,  # the paper's rate for its batch
    warmup_learning_rate=1e-4,
    min_learning_rate=1e-5,
    weight_decay=0.05,
    betas=(0.9, 0.999),
    epsilon=1e-8,
    drop_path_rate=0.3,
    label_smoothing=0.1,
    mixup_alpha=0.8,
    cutmix_alpha=1.0,
    mixup_group_size=8,
    random_erasing=0.25,
    random_resized_crop_area=(0.08, 1.0),
    random_resized_crop_ratio=(3 / 4, 4 / 3),
    horizontal_flip=0.5,
    rand_augment="rand-m9-mstd0.5-inc1",
    precision="fp32",
)
SEGMENTATION = SegmentationRecipe(
    global_batch_size=4,
    iterations=40,
    max_steps=20,
    learning_rate=2e-4,
    power=0.9,
    weight_decay=1e-4,
    betas=(0.9, 0.999),
    epsilon=1e-8,
    scale=(256, 64),
    ratio_range=(0.5, 2.0),
    crop_size=64,
    max_category_ratio=0.75,
    horizontal_flip=0.5,
    photometric_distortion=True,
    precision="fp32",
)

# Name -> ranks and largest micro-batch of each part of the run, and the step at which each but the last one stops.
LAYOUTS: dict[str, tuple[tuple[int, int, int | None], ...]] = {
    "1 rank": ((1, 1000, None),),
    "1 rank, 4 micro-batches": ((1, 4, None),),
    "2 ranks": ((2, 1000, None),),
    "4 ranks": ((4, 1000, None),),
    "2 ranks, then 1 rank of 4 micro-batches": ((2, 1000, 7), (1, 4, None)),
}


@dataclass(frozen=True)
class Training:
    """What is trained, and the part of the layout that is not the number of ranks."""

    data: Path
    folder: Path
    recipe: ClassificationRecipe | SegmentationRecipe
    dtype: Literal["float32", "float64"] = "float64"
    max_images_per_device: int = 1000
    activation_checkpointing: bool = False
    stop_after: int | None = None
    start: Path | None = None
    """The file that a classifier starts from."""


def make_data(folder: Path) -> Path:
    """JPEG photographs in classes, photographs with masks, each as a .beton, and a backbone's weights."""
    random = np.random.default_rng(0)
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for number in range(NUM_IMAGES):
        path = folder / f"images/class{number % CLASSES}/{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        _part(photographs[number % 2], random).save(path)
    for number in range(NUM_SCENES):
        image = _part(photographs[number % 2], random)
        blobs = Image.fromarray(random.integers(0, 256, (3, 4), dtype=np.uint8)).resize(image.size)
        mask = Image.fromarray((np.asarray(blobs).astype(int) * (CLASSES + 1) // 256).astype(np.uint8))
        for kind, picture, suffix in (("images", image, "jpg"), ("annotations", mask, "png")):
            path = folder / f"scenes/{kind}/training/{number:03}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    convert_image_folder(folder / "images", folder / "images.beton", workers=1)
    convert_segmentation_folder(folder / "scenes", "training", folder / "scenes.beton", workers=1, num_classes=CLASSES)
    torch.manual_seed(0)
    torch.save(create_classifier("poolformer_s12", CLASSES).state_dict(), folder / "backbone.pt")
    return folder


def _part(photograph: Image.Image, random: np.random.Generator) -> Image.Image:
    width, height = (int(side) for side in random.integers(50, 90, 2))
    left, top = (int(random.integers(0, most)) for most in (photograph.width - width, photograph.height - height))
    return photograph.crop((left, top, left + width, top + height))


def parts(training: Training, layout: str) -> list[tuple[int, Training]]:
    """The number of ranks of each part of a run, and what they train."""
    return [
        (size, replace(training, max_images_per_device=most, stop_after=stop_after))
        for size, most, stop_after in LAYOUTS[layout]
    ]


def make_task(training: Training, world: ranks.World) -> Task:
    """The task as its stage makes it."""
    recipe = training.recipe
    if isinstance(recipe, ClassificationRecipe):
        arguments = ("poolformer_s12", recipe, CLASSES, training.data / "images.beton", 3, world)
        return ClassificationTask(*arguments) if training.start is None else FineTuning(training.start, *arguments)
    return SegmentationTask(
        "poolformer_s12",
        recipe,
        CLASSES,
        training.data / "scenes.beton",
        training.data / "backbone.pt",
        CLASSES,
        seed=3,
        world=world,
    )


def run_rank(
    world: ranks.World, training: Training, spoil: Callable[[ranks.World, Task], None] = lambda world, task: None
) -> list[list[tuple[int, str]]]:
    """Train on this rank; returns each step's sample ids of this rank with a digest of what the model got for each."""
    task, recipe = make_task(training, world), training.recipe
    task.model.to(getattr(torch, training.dtype))
    spoil(world, task)
    seen: list[list[tuple[int, str]]] = []
    prepare = task.prepare

    def recorded(batch: Step, step: int, device: torch.device) -> tuple[Tensor, ...]:
        tensors = prepare(batch, step, device)
        seen.append(list(zip(batch.sample_ids.tolist(), digests(tensors), strict=True)))
        return tensors

    task.prepare = recorded  # type: ignore[method-assign]
    layout = split(
        recipe.global_batch_size,
        world.size,
        training.max_images_per_device,
        accumulates=isinstance(recipe, ClassificationRecipe),
    )
    training.folder.mkdir(exist_ok=True)
    train(
        task,
        world,
        training.folder,
        layout,
        seed=3,
        activation_checkpointing=training.activation_checkpointing,
        checkpoint_interval_s=1e9,
        should_stop=lambda: len(seen) == training.stop_after,
    )
    return seen


def digests(tensors: tuple[Tensor, ...]) -> Iterator[str]:
    """One for each image, over everything that the model and the loss get of it."""
    for row in zip(*tensors, strict=True):
        yield hashlib.sha256(b"".join(part.contiguous().numpy().tobytes() for part in row)).hexdigest()[:16]


def newest(folder: Path) -> dict[str, Any]:
    """The state that a training left."""
    state = checkpoint.load_newest(folder / "checkpoints")
    assert state is not None
    return state


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Over all weights and running statistics."""
    assert one.keys() == other.keys()
    return max(float((one[key].double() - other[key].double()).abs().max()) for key in one)


def measure(folder: Path) -> None:
    """Print how far from one rank's weights each layout's are after 20 steps, as a Markdown table."""
    data = make_data(folder)
    print("| task | precision | layout | largest | relative |\n| --- | --- | --- | --- | --- |")
    with rank_pool() as on_ranks:
        for task, recipe in (("classification", CLASSIFICATION), ("segmentation", SEGMENTATION)):
            for precision in ("fp64", "fp32", "bf16"):
                dtype: Literal["float32", "float64"] = "float64" if precision == "fp64" else "float32"
                recipe = recipe.model_copy(update={"precision": "bf16" if precision == "bf16" else "fp32"})
                shared = Training(data, folder / f"{task} {precision}", recipe, dtype)
                model = make_task(shared, ranks.alone()).model
                start = dict(model.named_parameters())
                on_ranks(1, run_rank, shared)
                one = _parameters(shared, model)
                runs = {
                    layout: parts(shared, layout)
                    for layout in list(LAYOUTS)[1:]
                    if task == "classification" or "micro-batches" not in layout
                }
                for name in (*runs, "1 rank, last bits of the starting weights changed"):
                    other = replace(shared, folder=folder / f"{task} {precision} {name}")
                    for size, part in runs.get(name, [(1, shared)]):
                        spoil = () if name in runs else (change_last_bits,)
                        on_ranks(size, run_rank, replace(part, folder=other.folder), *spoil)
                    weights = _parameters(other, model)
                    relative = distance(one, weights) / distance(one, start)
                    largest = largest_difference(one, weights)
                    print(f"| {task} | {precision} | {name} | {largest:.1e} | {relative:.1e} |", flush=True)


def change_last_bits(world: ranks.World, task: Task) -> None:
    """Each starting weight up or down by at most a unit in the last place of float32."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in task.model.parameters():
            weight.mul_(1 + (torch.randint(0, 3, weight.shape, generator=generator) - 1) * 2.0**-23)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The Euclidean distance of all weights."""
    return sum(float((one[key].double() - other[key].double()).square().sum()) for key in one) ** 0.5


def _parameters(training: Training, model: torch.nn.Module) -> dict[str, Tensor]:
    state = newest(training.folder)["model"]
    return {name: state[name] for name, _ in model.named_parameters()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    measure(Path(sys.argv[1]))
