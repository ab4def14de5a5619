"""What `python -m pipeline doctor --test-job` runs on the cluster: every rank says where it is and what it has."""

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline import device as ranks
from pipeline import paths
from pipeline.cluster import Profile


def report(world: ranks.World, run_folder: Path, profile: Profile, *, nonce: str) -> bool:
    """Rank 0 writes `out/report.json`: one entry per rank, in order.

    `sum` is an all_reduce over rank + 1 on the ranks' devices. `nonce` makes each test job's fingerprint its own.
    """
    total = torch.tensor(world.rank + 1.0, device=world.device)
    if world.size > 1:
        dist.all_reduce(total)
    own: dict[str, Any] = {
        "node": os.environ.get("SLURMD_NODENAME", os.uname().nodename),
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU",
        "gpus": torch.cuda.device_count(),
        "cores": len(os.sched_getaffinity(0)),
        "sees_checkout": Path("params.yaml").exists(),
        "sum": total.item(),
    }
    entries: list[Any] = [own] * world.size
    if world.size > 1:
        dist.all_gather_object(entries, own)
    if world.is_first:
        with paths.written_atomically(run_folder / "out/report.json") as temporary:
            temporary.write_text(json.dumps(entries, indent=2))
    return True
