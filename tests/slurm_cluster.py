"""The two-node Slurm of slurm/dev_cluster as a fixture, up once for a test session.

A test module that wants it says `pytest_plugins = "slurm_cluster"` and asks for `slurm_cluster`.
PYTEST_DONT_REWRITE: such a module imports this one before pytest could.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import skip

DEV_CLUSTER = Path(__file__).parent.parent / "slurm/dev_cluster"
STATE = Path("/run/slurm_dev")
ON_SLURM = [pytest.mark.slow, pytest.mark.usefixtures("nothing_left")]
"""The marks of a module whose tests use the cluster."""
INTERVAL = 20
"""Steps between two checkpoints with PROFILE: one with each line of the history."""
PROFILE = """
kind: slurm
nodes: 2
gpus_per_node: 0
cpus_per_task: 1
partition: main
time_min: 30
signal_delay_s: 60
checkpoint_interval_s: 0.001
environment:
  SLURM_CONF: /run/slurm_dev/slurm.conf
  GLOO_SOCKET_IFNAME: lo
"""
"""Of trainings that are disturbed."""
CANNOT_RUN_HERE = 2  # dev_cluster's exit status where the user has to do something first


def wait_until(is_so: Callable[[], object], what: str, limit_s: float = 600) -> None:
    """Return as soon as `is_so()` is true; AssertionError after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < deadline, f"not within {limit_s:.0f} s: {what}"
        time.sleep(0.2)


def rank_processes(job: str | None = None) -> list[tuple[int, psutil.Process]]:
    """Number and process of each rank of a job, or of all jobs; `job` is SLURM_JOB_ID, in an array, too."""
    found = []
    for process in psutil.process_iter(["cmdline", "name"]):
        if "submitit.core._submit" not in (process.info["cmdline"] or []) or process.info["name"] == "srun":
            continue
        try:
            environment = process.environ()
        except psutil.Error:
            continue
        if "SLURM_PROCID" in environment and job in (None, environment.get("SLURM_JOB_ID")):
            found.append((int(environment["SLURM_PROCID"]), process))
    return found


def suspend_trainings(*folders: Path) -> None:
    """Stop the ranks of those that run, once these have made steps: to Slurm they go on, and the cores are free.

    scancel wakes them. Sooner they would not heed it: Python imports for seconds.
    """
    histories, since = [folder / "history.jsonl" for folder in folders], time.time()
    wait_until(lambda: all(file.exists() and file.stat().st_mtime > since for file in histories), "some steps")
    for _, process in rank_processes():
        process.suspend()


def dev_cluster(command: str) -> subprocess.CompletedProcess[str]:
    """Run `slurm/dev_cluster up|down|status`."""
    return subprocess.run([DEV_CLUSTER, command], capture_output=True, text=True)


class SlurmCluster:
    """The running cluster: nodes n1 and n2, partitions `main` (preemptible) and `priority`.

    `environment` is this process's, without an outer job's variables, and with SLURM_CONF.
    """

    def __init__(self, *, is_borrowed: bool) -> None:
        self.is_borrowed = is_borrowed  # somebody had it up before the tests: they leave it up
        outer = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        self.environment = outer | {"SLURM_CONF": str(STATE / "slurm.conf")}

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """What a command prints; AssertionError with its errors when it fails."""
        done = subprocess.run(command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{command} failed\n{done.stdout}\n{done.stderr}"
        return done.stdout.strip()

    def submit(self, folder: Path, script: str, *options: str) -> str:
        """Submit a bash script that runs in `folder`, its output in JOB.out; the job's id.

        Options are sbatch's. A requeued attempt appends to the output.
        """
        command = ["sbatch", "--parsable", "--open-mode=append", "--output=%j.out", *options]
        return self.run(*command, f"--wrap={script}", cwd=folder)

    def state(self, job: str) -> str:
        """sacct's state of the job's latest attempt; nothing in the job's first second or so."""
        return self.run("sacct", "--allocations", "--noheader", "--parsable2", "--format=state", f"--jobs={job}")

    def up(self) -> None:
        """Start again whatever has been killed; bring nodes back that are down or drained."""
        done = dev_cluster("up")
        assert done.returncode == 0, done.stderr

    def is_whole(self) -> bool:
        """Whether every daemon runs."""
        files = list((STATE / "pids").iterdir())
        return len(files) == 6 and all(Path(f"/proc/{file.read_text().strip() or 0}").exists() for file in files)

    def pid(self, service: str) -> int:
        """Process id of munged, mariadbd, slurmdbd, slurmctld, n1 or n2 (its slurmd)."""
        return int((STATE / "pids" / service).read_text())

    def kill(self, service: str) -> None:
        """SIGKILL. A killed node's jobs die with it, as on a machine that loses its power.

        slurmctld writes its state every 5 s: killed sooner after a job's start, it comes back
        without it and holds the job. SIGTERM to `pid("slurmctld")` loses nothing.
        """
        pid = self.pid(service)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), f"the end of {service}")


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """The cluster, brought up when it is not; skips where that cannot be, and fails there in CI."""
    is_borrowed = dev_cluster("status").returncode == 0
    started = dev_cluster("up")
    if started.returncode == CANNOT_RUN_HERE:
        skip(started.stderr.strip())
    if started.returncode != 0:
        pytest.fail(started.stderr, pytrace=False)
    yield SlurmCluster(is_borrowed=is_borrowed)
    if not is_borrowed:
        dev_cluster("down")


@pytest.fixture
def nothing_left(slurm_cluster: SlurmCluster) -> Iterator[None]:
    """After a test, whatever became of it: every service up, both nodes idle, no job in the queue."""
    yield
    states = ["sinfo", "--noheader", "--Node", "--format=%T"]
    healthy = {"idle", "mixed", "allocated", "completing"}
    if not slurm_cluster.is_whole() or not set(slurm_cluster.run(*states).split()) <= healthy:
        slurm_cluster.up()
    if slurm_cluster.run("squeue", "--noheader"):
        slurm_cluster.run("scancel", "--user=root")
        wait_until(lambda: not slurm_cluster.run("squeue", "--noheader"), "an empty queue")
    wait_until(lambda: set(slurm_cluster.run(*states).split()) == {"idle"}, "idle nodes")
