"""What a rank checks before its call: that it has the GPU which the job asked for, and that all ranks compute alike."""

import json
import logging
import platform
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cluster import Profile
from pipeline.launch import record
from pipeline.launch.attempts import Attempt, InfrastructureError, node
from pipeline.launch.fingerprint import content_digest

if TYPE_CHECKING:
    from torch.distributed import Store

log = logging.getLogger(__name__)
SOFTWARE = ("torch", "torchvision", "timm", "ffcv", "numpy", "pillow", "opencv-python-headless")
OWN = ("node", "gpu")
"""What may differ between ranks."""


def facts(profile: Profile, local_rank: int, arguments: dict[str, Any]) -> dict[str, str]:
    """Of this rank: versions, device, driver, the precision that the arguments' `precision` comes to.

    Raises:
        InfrastructureError: the job asked for GPUs, and torch sees none.
    """
    import torch

    from pipeline import device as ranks

    found = {name: version(name) for name in SOFTWARE} | {"python": platform.python_version()}
    for library in ("pipeline.data._pixels", "pipeline.models._block"):
        spec = find_spec(library)
        if spec is not None and spec.origin is not None:
            found[library] = content_digest(Path(spec.origin))[:16]
    device = torch.device("cpu")
    if profile.gpus and not torch.cuda.is_available():
        raise InfrastructureError(
            f"the job asked for {profile.gpus} GPUs, and torch finds none on {node()}: see `nvidia-smi` there (a "
            "container needs its option for GPUs, as --nv); gpus_per_node: 0 in the cluster profile trains on CPUs"
        )
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "gpu": str(properties.uuid), "driver": _driver()}
    else:
        found["device"] = "CPU"
    if (precision := _precision(arguments)) is not None:
        found["precision"] = ranks.precision_in_use(device, precision)
    return found | {"node": node()}


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _precision(arguments: dict[str, Any]) -> Any:
    """The recipe's or the evaluation's `precision`, wherever it is among a call's arguments."""
    for name, value in arguments.items():
        if name == "precision":
            return value
        if isinstance(value, dict) and (found := _precision(value)) is not None:
            return found
    return None


def agree(store: "Store", rank: int, size: int, own: dict[str, str], profile: Profile) -> None:
    """Compare what all ranks have, over the store by which they find one another.

    Raises:
        InfrastructureError: they would not compute alike, or share a GPU that each should have alone.
    """
    store.set(f"facts of {rank}", json.dumps(own))
    everyone = [json.loads(store.get(f"facts of {other}")) for other in range(size)]
    first = everyone[0]
    for other, theirs in enumerate(everyone):
        differing = [name for name in sorted(first.keys() | theirs.keys()) if first.get(name) != theirs.get(name)]
        if differing := [name for name in differing if name not in OWN]:
            parts = [f"{name} {first.get(name)} and {theirs.get(name)}" for name in differing]
            raise InfrastructureError(
                f"rank 0 on {first['node']} and rank {other} on {theirs['node']} differ in {'; '.join(parts)}: choose "
                "nodes that are alike, by partition or constraint in the cluster profile"
            )
    gpus = [(each["node"], each["gpu"]) for each in everyone if "gpu" in each]
    if len(set(gpus)) < len(gpus) and profile.ranks_here <= profile.gpus:
        shared = next(gpu for gpu in gpus if gpus.count(gpu) > 1)
        named = ", ".join(str(other) for other, gpu in enumerate(gpus) if gpu == shared)
        raise InfrastructureError(f"ranks {named} on {shared[0]} see one GPU only, and {profile.gpus} were asked for")


def hold_to(folder: Path, attempt: Attempt, own: dict[str, str]) -> None:
    """Record what this attempt runs. A warning if the last one ran other software.

    Raises:
        InfrastructureError: the run has steps in another precision.
    """
    before = (record.software(folder) or [{}])[-1]
    began_in, step = before.get("precision"), record.newest_step(folder)
    if step and began_in is not None and began_in != own.get("precision"):
        raise InfrastructureError(
            f"the first {step} steps were computed in {began_in}, and {own['device']} on {own['node']} computes in "
            f"{own.get('precision')}: choose nodes like those before, by partition or constraint in the cluster profile"
        )
    for name in sorted(before.keys() & own.keys() - {"attempt", *OWN}):
        if before[name] != own[name]:
            log.warning("%s is %s now; the previous attempt ran %s", name, own[name], before[name])
    record.add_software(folder, {"attempt": str(attempt), **{k: v for k, v in own.items() if k not in OWN}})
