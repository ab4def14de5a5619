"""The frame around every training: layout, loop, and the two files that it leaves."""

from pathlib import Path

import torch

from pipeline import paths
from pipeline import world as ranks
from pipeline.cluster import Profile, split
from pipeline.train import history
from pipeline.train.loop import Task, train


def run_recipe(task: Task, world: ranks.World, run_folder: Path, profile: Profile, *, seed: int) -> bool:
    """Train `task` to the end; rank 0 then writes `out/weights.pt` and `out/curve.csv` into the run folder.

    Returns and raises what `loop.train` does.
    """
    layout = split(task.global_batch_size, world.size, profile.max_images_per_device)
    finished = train(
        task,
        world,
        run_folder,
        seed=seed,
        micro_batch_size=layout.micro_batch_size,
        checkpoint_interval_s=profile.checkpoint_interval_s,
    )
    if finished and world.is_first:
        with paths.written_atomically(run_folder / "out/weights.pt") as temporary:
            torch.save({"model": task.model.state_dict()}, temporary)
        history.write_curve(run_folder / "history.jsonl", run_folder / "out/curve.csv")
    return finished
