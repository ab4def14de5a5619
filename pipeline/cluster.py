"""Cluster profiles: where a job runs, and how a global batch is spread over its ranks. Never a DVC dependency."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import yaml
from pydantic import Field, model_validator

from pipeline.config import Strict, validate
from pipeline.errors import UserError

FOR_SLURM = (
    "partition", "account", "qos", "constraint", "memory_gb", "time_min", "signal_delay_s", "array_parallelism",
    "max_jobs", "drive", "notify", "gpu_type", "srun_args", "container", "setup", "additional",
)  # fmt: skip


INSTEAD = {
    **{name: name for name in ("partition", "account", "qos", "constraint", "nodes", "gpus_per_node", "cpus_per_task")},
    "mem": "memory_gb",
    "time": "time_min",
    "ntasks_per_node": "ranks_per_node",
    "signal": "signal_delay_s",
    "array": "array_parallelism",
    "clusters": "SLURM_CONF in environment (jobs are followed on one cluster)",
    "requeue": "nothing (jobs requeue themselves)",
    "no_requeue": "nothing (jobs requeue themselves)",
    "comment": "nothing (jobs are found by theirs)",
    "dependency": "nothing (jobs have their own)",
    "output": "nothing (logs lie in the run folder)",
    "error": "nothing (logs lie in the run folder)",
}
"""Options of sbatch that `additional` must not have, and the field that has their place."""
JOB_GB, JOBS_HERE = 4, 4
"""What a job of the demo needs at most, and how many run side by side without GPUs: its tensors are too small for many
threads, and two jobs of one thread each are done in half of the time of one after another with two."""
_SECRET_NAME = re.compile(r"token|passw|passphrase|secret|credential|(api|access|private|auth)_?key|jwt", re.I)
_SECRET_VALUE = re.compile(r"://[^/@\s]+@")
"""An address with a user or a password in it."""


def is_secret(name: str, value: str) -> bool:
    """Whether a variable is one that must not be written down."""
    return bool(_SECRET_NAME.search(name) or _SECRET_VALUE.search(value))


class Profile(Strict):
    """One YAML file in `slurm/`, named by PIPELINE_CLUSTER."""

    kind: Literal["local", "slurm"] = Field(description="this machine, or sbatch")
    nodes: int | str = Field(
        default=1, description="or a range, as 2..8: starts, and goes on after a lost node, with as many as there are"
    )
    gpus_per_node: int | Literal["auto"] = Field(default="auto", description="'auto' (local only): all visible ones")
    ranks_per_node: int | None = Field(default=None, ge=1, description="default: one per GPU, or one without GPUs")
    cpus_per_task: int | Literal["auto"] = Field(default="auto", description="'auto' (local only): cores / ranks")
    max_images_per_device: int = Field(
        default=128, ge=1, description="larger shares of a batch are accumulated over micro-batches"
    )
    activation_checkpointing: bool = Field(
        default=False, description="less memory in training, a third more arithmetic"
    )
    compile: bool = Field(default=False, description="training's blocks through torch.compile")
    checkpoint_interval_s: float = Field(default=600, gt=0)
    stall_min: float = Field(
        default=30, ge=0, description="minutes without a step or batch after which a job is ended and retried; 0: never"
    )
    validations: int = Field(
        default=30,
        ge=0,
        description="validation passes during a classifier's training, spread evenly over the epochs; 0: none",
    )
    local_copy: str | None = Field(
        default=None,
        description="folder on each node's own disk for a copy of the data, as $SLURM_TMPDIR; default: none",
    )
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    memory_gb: float | None = Field(default=None, gt=0, description="per node")
    time_min: int = Field(default=24 * 60, ge=1, description="longest a job may run before it is requeued")
    signal_delay_s: int = Field(default=120, ge=1, description="warning before the time limit, to write a checkpoint")
    array_parallelism: int = Field(default=256, ge=1, description="how many trainings queued together may run at once")
    queue_ahead: int | Literal["auto"] | None = Field(
        default=None,
        description="trainings queued beyond the job that dvc repro waits for; default: all, or none on this machine, "
        "where they run beside it; 'auto' (local only): as many as a machine without GPUs has room for",
    )
    gpu_type: str | None = Field(default=None, description="as in --gpus-per-node=TYPE:NUMBER")
    srun_args: tuple[str, ...] = Field(default=(), description="further options of srun, as --mpi=none")
    max_jobs: int | None = Field(
        default=None, ge=1, description="most pending and running jobs of all stages; queueing ahead stops there"
    )
    drive: dict[str, str | int | bool] = Field(
        default={}, description="#SBATCH options of the job of `python -m pipeline drive`, by long name"
    )
    notify: str | None = Field(
        default=None, description="shell command at the end of a drive; $MESSAGE says how it ended"
    )
    container: str | None = Field(default=None, description="command that runs its arguments in a container")
    setup: tuple[str, ...] = Field(default=(), description="shell lines before the job starts")
    environment: dict[str, str] = Field(default={}, description="environment of sbatch and of the job")
    additional: dict[str, str | int | bool] = Field(default={}, description="further #SBATCH options by long name")

    @model_validator(mode="after")
    def _kinds_differ(self) -> "Profile":
        counts = self.node_counts  # raises ValueError
        if not counts or counts[0] < 1:
            raise ValueError(f"nodes: {self.nodes} must be a number from 1 on, or a range as 2..8")
        if self.kind == "local":
            if self.nodes != 1:
                raise ValueError("kind local has one node; use kind slurm for more")
            if self.gpus and self.ahead:
                raise ValueError("queue_ahead: jobs side by side would share the GPUs of this machine: set it to 0")
            if only := [name for name in FOR_SLURM if name in self.model_fields_set]:
                raise ValueError(f"{', '.join(only)} means nothing for kind local: remove it")
        elif wrong := self._wrong_additional():
            raise ValueError(wrong)
        elif "auto" in (self.gpus_per_node, self.cpus_per_task, self.queue_ahead):
            raise ValueError("'auto' is for kind local: give gpus_per_node, cpus_per_task and queue_ahead as numbers")
        elif self.signal_delay_s >= self.time_min * 60:
            raise ValueError(f"signal_delay_s ({self.signal_delay_s}) must be below time_min ({self.time_min} min)")
        return self

    def _wrong_additional(self) -> str | None:
        """What is wrong with `additional`."""
        for given, value in self.additional.items():
            name = given.replace("-", "_")
            if name in INSTEAD:
                return f"additional {given}: set {INSTEAD[name]} instead"
            if value is False:
                return f"additional {given}: false is no option of sbatch; leave it out, or name its opposite"
        return None

    @property
    def open_environment(self) -> dict[str, str]:
        """`environment` without what looks like a secret: that reaches jobs through sbatch alone, and no file."""
        return {name: value for name, value in self.environment.items() if not is_secret(name, value)}

    @property
    def gpus(self) -> int:
        """GPUs per node."""
        if self.gpus_per_node != "auto":
            return self.gpus_per_node
        if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
            return len([device for device in visible.split(",") if device.strip()])
        return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))

    @property
    def ranks_here(self) -> int:
        """Ranks (processes) per node."""
        return self.ranks_per_node or max(1, self.gpus)

    @property
    def node_counts(self) -> range:
        """The numbers of nodes that a job may have, ascending: one unless `nodes` is a range."""
        if isinstance(self.nodes, int):
            return range(self.nodes, self.nodes + 1)
        match = re.fullmatch(r"(\d+)\.\.(\d+)", self.nodes)
        if match is None:
            raise ValueError(f"nodes: {self.nodes} must be a number, or a range as 2..8")
        return range(int(match[1]), int(match[2]) + 1)

    @property
    def world_size(self) -> int:
        """Ranks of a job that has all its nodes."""
        return self.node_counts[-1] * self.ranks_here

    @property
    def ahead(self) -> int | None:
        """Trainings beyond the job that `dvc repro` waits for; None: all."""
        if self.queue_ahead == "auto":
            memory_gb = psutil.virtual_memory().total / 1e9
            return 0 if self.gpus else max(0, min(cores_here(), int(memory_gb / JOB_GB), JOBS_HERE) - 1)
        return 0 if self.kind == "local" and self.queue_ahead is None else self.queue_ahead

    @property
    def cpus(self) -> int:
        """CPU cores per rank."""
        if self.cpus_per_task != "auto":
            return self.cpus_per_task
        return max(1, cores_here() // self.ranks_here // (1 + (self.ahead or 0)))


@dataclass(frozen=True)
class BatchSplit:
    """How one rank processes its share of a global batch."""

    per_rank: int
    micro_batch_size: int
    accumulates: bool
    """Whether the share may be split into micro-batches."""

    @property
    def accumulation(self) -> int:
        return -(-self.per_rank // self.micro_batch_size)

    def halved(self) -> "BatchSplit | None":
        """The same share in micro-batches of at most half the size, if that is possible."""
        if not self.accumulates or self.micro_batch_size == 1:
            return None
        return BatchSplit(self.per_rank, _micro_batch_size(self.per_rank, self.micro_batch_size // 2), True)


def split(
    global_batch_size: int, world_size: int, max_images_per_device: int, *, accumulates: bool = True
) -> BatchSplit:
    """Spread a recipe's global batch over a profile's ranks; nothing else combines the two.

    The micro-batch is the largest divisor of a rank's share that fits on the device, so that all are equal.

    Args:
        accumulates: False for a model with batch norm: its statistics are the global batch's, which ranks can compute
            together, but consecutive micro-batches cannot.

    Raises:
        UserError: the batch cannot be divided evenly, or is too large for a model that does not accumulate.
    """
    if global_batch_size % world_size:
        fits = [size for size in range(1, world_size + 1) if global_batch_size % size == 0]
        raise UserError(
            f"a global batch of {global_batch_size} cannot be spread evenly over {world_size} ranks: "
            f"use a cluster profile of {fits[-1]} ranks, or another global_batch_size"
        )
    share = global_batch_size // world_size
    if share > max_images_per_device and not accumulates:
        enough = next(
            ranks
            for ranks in range(world_size, global_batch_size + 1)
            if global_batch_size % ranks == 0 and global_batch_size // ranks <= max_images_per_device
        )
        raise UserError(
            f"a rank's share of {share} images is above max_images_per_device: {max_images_per_device}, and cannot be "
            "accumulated, as batch norm needs the whole batch at once: use a cluster profile of "
            f"{enough} ranks, or max_images_per_device: {share} (activation_checkpointing: true saves memory)"
        )
    return BatchSplit(share, _micro_batch_size(share, max_images_per_device), accumulates)


def usable_nodes(profile: Profile, batch_size: int, *, accumulates: bool = True) -> list[int]:
    """The numbers of nodes in a profile's range over whose ranks a global batch can be spread, ascending.

    Raises:
        UserError: there is none.
    """
    found = []
    for nodes in profile.node_counts:
        try:
            split(batch_size, nodes * profile.ranks_here, profile.max_images_per_device, accumulates=accumulates)
        except UserError as error:
            reason = error
        else:
            found.append(nodes)
    if not found:
        raise reason
    return found


def _micro_batch_size(share: int, most: int) -> int:
    return max(size for size in range(1, min(share, most) + 1) if share % size == 0)


def load_profile(path: Path) -> Profile:
    """Read and check a cluster profile.

    Raises:
        UserError: it is missing or invalid.
    """
    try:
        data = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        there = ", ".join(sorted(str(other) for other in Path("slurm").glob("*.yaml")))
        raise UserError(f"cluster profile {path} is missing; PIPELINE_CLUSTER may name one of: {there}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from None
    return validate(Profile, data, str(path))


def cores_here() -> int:
    """CPU cores that this process may use."""
    return len(psutil.Process().cpu_affinity())
