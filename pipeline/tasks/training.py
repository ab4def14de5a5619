"""The frame around every training: layout, loop, and the files that it leaves; released weights in its place."""

import json
import platform
import statistics
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline import device as ranks
from pipeline import paths
from pipeline.cluster import BatchSplit, Profile
from pipeline.config import Params
from pipeline.errors import UserError
from pipeline.models.released_weights import load_released
from pipeline.tasks import description
from pipeline.train import checkpoint, history, system
from pipeline.train.loop import train
from pipeline.train.task import Task, Validation


class SeededInitialisation(TorchDispatchMode):
    """Models made inside draw their weights from a generator that nothing else has.

    The weights are those of `torch.manual_seed(seed)` before. But torch's global stream belongs to every thread of the
    process; a mode belongs to the thread that enters it.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if any(argument.name == "generator" for argument in func._schema.arguments):
            kwargs["generator"] = self.generator
        return func(*args, **kwargs)


def run_recipe(
    task: Task,
    world: ranks.World,
    run_folder: Path,
    layout: BatchSplit,
    profile: Profile,
    *,
    seed: int,
    validation: Validation | None = None,
) -> bool:
    """Train `task` to the end; rank 0 then writes `out/{weights.pt,curve.csv,validation.csv,cost.json}`.

    Returns and raises what `loop.train` does.
    """
    samples = run_folder / "system.jsonl"
    with system.sampled(samples) if world.is_first else nullcontext():
        finished = train(
            task,
            world,
            run_folder,
            layout,
            seed=seed,
            activation_checkpointing=profile.activation_checkpointing,
            compiles=profile.compile,
            checkpoint_interval_s=profile.checkpoint_interval_s,
            should_stop=world.should_stop,
            validation=validation,
        )
    if finished and world.is_first:
        checkpoint.write(run_folder / "out/weights.pt", {"model": task.model.state_dict()})
        records = history.read(run_folder / "history.jsonl")
        history.write_curve(records, run_folder / "out/curve.csv")
        history.write_validation(history.read(run_folder / "validation.jsonl"), run_folder / "out/validation.csv")
        with paths.written_atomically(run_folder / "out/cost.json") as temporary:
            cost = _cost(task, world, records)
            energy = system.energy_kwh(samples)  # of this node; the others do the same work
            nodes = cost["rank_hours"] * 3600 / records[-1]["seconds"] / profile.ranks_here  # on average
            cost["energy_kwh"] = None if energy is None else energy * nodes
            temporary.write_text(json.dumps(cost, indent=2) + "\n")
    return finished


def _cost(task: Task, world: ranks.World, records: list[dict[str, Any]]) -> dict[str, Any]:
    """What the training took, resumes included: the numbers that a forecast and the report's cost table rest on."""
    on_gpu = world.device.type == "cuda"
    rank_hours, since = 0.0, 0.0
    for record in records:  # a resumed run may have had another number of ranks before
        rank_hours += (record["seconds"] - since) * record.get("ranks", world.size) / 3600
        since = record["seconds"]
    return {
        "device": torch.cuda.get_device_name(world.device) if on_gpu else f"{platform.machine()} CPU",
        "ranks": world.size,
        "cpus_per_rank": world.cpus,
        "precision": ranks.precision_in_use(world.device, task.precision),
        "image_size": task.image_size,
        "training_images": task.images,
        "images_per_s": statistics.median(record["images_per_s"] for record in records),
        "peak_memory_gb": max(record["peak_memory_gb"] for record in records),
        "rank_hours": rank_hours,
        "gpu_hours": rank_hours if on_gpu else 0.0,
    }


def take_released(params: Params, task: description.Task, variant: str, outputs: Mapping[str, Path]) -> None:
    """Write the authors' weights to where the training's would be, with empty curves and no cost."""
    names = description.load(task.released)
    if variant not in names:
        raise UserError(f"there are no released weights of {variant}: compose {task.section}.weights=trained")
    file = Path(params.released.folder) / names[variant]
    model = load_released(description.load(task.create)(variant, task.data.section(params).num_classes), file)
    checkpoint.write(outputs["weights.pt"], {"model": model.state_dict()})
    history.write_curve([], outputs["curve.csv"])
    history.write_validation([], outputs["validation.csv"])
    with paths.written_atomically(outputs["cost.json"]) as temporary:
        temporary.write_text("{}\n")
