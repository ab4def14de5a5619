"""What `python -m pipeline doctor` checks of a Slurm profile, without a job and with one."""

import fcntl
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from pipeline import paths
from pipeline.cluster import Profile
from pipeline.errors import UserError
from pipeline.launch.fingerprint import Work
from pipeline.launch.first_profile import gpus, minutes
from pipeline.launch.jobs import run_job
from pipeline.launch.scheduler import Finding
from pipeline.launch.slurm import script
from pipeline.launch.slurm_status import UnreachableError, ask

if TYPE_CHECKING:
    from pipeline.device import World

SHARED = {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "panfs", "cifs", "fuse.glusterfs", "wekafs", "orangefs"}
TEST_JOB_MIN = 5
IGNORED = ("SBATCH_", "SLURM_CLUSTERS", "SLURM_ACCOUNT")
"""Variables that sbatch would take for options; jobs are the profile's alone."""


def check(profile: Profile, path: Path) -> Iterator[Finding]:
    """Programs, partition and limits, file system; nothing is submitted."""
    for program in ("sbatch", "squeue", "scontrol", "srun"):
        if shutil.which(program, path=profile.environment.get("PATH")) is None:
            yield Finding("fault", program, "not on the PATH: log in to a node of the cluster, or load its module")
            return
    try:
        listed = ask(["sinfo", "--noheader", "--format=%R"], profile.environment).split()
    except UnreachableError as error:
        yield Finding("fault", "Slurm", f"does not answer: {error}")
        return
    partitions = ", ".join(sorted(set(listed)))
    if profile.partition is not None and not set(profile.partition.split(",")) <= set(listed):
        yield Finding("fault", "partition", f"{profile.partition} is not one of {partitions}: correct {path}")
        return
    yield Finding("ok", "Slurm", f"answers; partitions {partitions}")
    if ignored := sorted(name for name in os.environ if name.startswith(IGNORED)):
        yield Finding("note", "shell", f"{', '.join(ignored)} of the shell mean nothing here: say it in {path}")
    yield from _sizes(profile, path)
    yield _acceptance(profile, path)
    yield _accounting(profile)
    yield _file_system()
    if profile.container is not None and shutil.which(profile.container.split()[0]) is None:
        yield Finding("note", "container", f"{profile.container.split()[0]} is not installed here; the nodes need it")


def _sizes(profile: Profile, path: Path) -> Iterator[Finding]:
    """Whether enough nodes are large enough, and what they lack if not."""
    of_partition = [f"--partition={profile.partition}"] if profile.partition else []
    command = ["sinfo", "--noheader", "--Node", *of_partition, "--format=%N|%c|%m|%G|%l"]
    nodes = {line.split("|")[0]: line.split("|")[1:] for line in ask(command, profile.environment).splitlines()}
    cores = profile.ranks_here * profile.cpus
    needs = [
        ("cores", cores, [int(node[0].rstrip("+")) for node in nodes.values()]),
        ("MB of memory", round((profile.memory_gb or 0) * 1024), [int(node[1].rstrip("+")) for node in nodes.values()]),
        ("GPUs", profile.gpus, [sum(n for _, n in gpus(node[2])) for node in nodes.values()]),
    ]
    for unit, wanted, there in needs:
        enough = sum(number >= wanted for number in there)
        if enough < profile.node_counts[0]:
            text = f"{enough} of {len(nodes)} nodes have the {wanted} {unit} that {profile.nodes} must have (most: "
            yield Finding("fault", "nodes", f"{text}{max(there, default=0)}): correct {path}")
            return
    each = f"{cores} cores and {profile.gpus} GPUs each"
    yield Finding("ok", "nodes", f"{len(nodes)}, of which a job takes {profile.nodes} with {each}")
    limits = {minutes(node[3]) for node in nodes.values()}
    if limits and (limit := max(limits)) < profile.time_min:
        yield Finding(
            "fault", "time_min", f"{profile.time_min} is above the partition's limit of {limit:.0f}: correct {path}"
        )


def _acceptance(profile: Profile, path: Path) -> Finding:
    """Whether sbatch accepts the profile: accounts, limits and everything else that the site decides."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            ask(["sbatch", "--test-only", str(script(profile, Path(folder)))], profile.environment)
    except UnreachableError as error:
        return Finding("fault", "sbatch", f"would refuse a job of this profile: {error}: correct {path}")
    return Finding("ok", "sbatch", "would accept a job of this profile")


def _accounting(profile: Profile) -> Finding:
    try:
        ask(["sacct", "--noheader", "--allocations"], profile.environment)
    except (UnreachableError, UserError) as error:
        return Finding("note", "sacct", f"no accounting ({error}): how a job ended is known only while squeue lists it")
    return Finding("ok", "sacct", "answers")


def _file_system() -> Finding:
    here = Path.cwd()
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    kind = next((mounts[folder] for folder in (here, *here.parents) if folder in mounts), "unknown")
    if kind in SHARED:
        return Finding("ok", "file system", f"{here} is on {kind}")
    return Finding("note", "file system", f"{here} is on {kind}: do all nodes see it? `doctor --test-job` checks that")


def try_job(profile: Profile) -> Iterator[Finding]:
    """Submit a small job in the way of a training, and report what its ranks found.

    Raises:
        UserError: it failed.
    """
    short = profile.model_copy(update={"time_min": min(profile.time_min, TEST_JOB_MIN), "signal_delay_s": 10})
    result = paths.RUNS / "doctor/test-job.json"
    work = Work(
        stage="doctor",
        name="test-job",
        call="pipeline.launch.check:report",
        arguments={"nonce": secrets.token_hex(8)},
        is_retried=False,
    )
    run_job(work, {"report.json": result}, profile=short)
    ranks = json.loads(result.read_text())
    for rank, entry in enumerate(ranks):
        text = f"{entry['node']}: {entry['device']}, {entry['gpus']} GPUs, {entry['cores']} cores"
        faults = []
        if entry["gpus"] < profile.gpus:
            faults.append(f"{profile.gpus} GPUs were requested")
        if not entry["sees_checkout"]:
            faults.append(f"does not see {Path.cwd()}")
        if entry["sum"] != len(ranks) * (len(ranks) + 1) / 2:
            faults.append(f"all_reduce gave {entry['sum']}")
        if not entry["locks"]:
            faults.append("got a lock that rank 0 holds: launch from one machine only (flock)")
        yield Finding("fault" if faults else "ok", f"rank {rank}", "; ".join([text, *faults]))
    if len(ranks) not in [nodes * profile.ranks_here for nodes in profile.node_counts]:
        yield Finding("fault", "ranks", f"{len(ranks)} instead of {profile.world_size}")


def _locks_hold(world: "World", file: Path) -> bool:
    """Whether a lock of rank 0 keeps this rank out, as it must between nodes; True for rank 0."""
    import torch.distributed as dist

    if world.size == 1:
        return True
    with file.open("a") as stream:
        if world.is_first:
            fcntl.flock(stream, fcntl.LOCK_EX)
        dist.barrier()
        holds = world.is_first
        if not world.is_first:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                holds = True
        dist.barrier()
    return holds


def report(world: "World", run_folder: Path, profile: Profile, *, nonce: str) -> bool:
    """Run by every rank of the test job; rank 0 writes `out/report.json`: one entry per rank, in order.

    `sum` is an all_reduce over rank + 1 on the ranks' devices. `nonce` makes each test job's fingerprint its own.
    """
    import torch
    import torch.distributed as dist

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
        "locks": _locks_hold(world, run_folder / "flock"),
    }
    entries = world.gather(own)
    if world.is_first:
        with paths.written_atomically(run_folder / "out/report.json") as temporary:
            temporary.write_text(json.dumps(entries, indent=2))
    return True
