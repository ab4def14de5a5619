"""slurm/dev_cluster: a real two-node Slurm that comes up, fails on request and leaves nothing."""

import importlib.machinery
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import psutil
import pytest
from conftest import skip
from slurm_cluster import DEV_CLUSTER, ON_SLURM, STATE, SlurmCluster, dev_cluster, wait_until

pytest_plugins = "slurm_cluster"
pytestmark = ON_SLURM

ALL_REDUCE = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(total)
print(dist.get_rank(), dist.get_world_size(), total.item())
dist.destroy_process_group()
"""
# Says which attempt it is and runs on; at USR2 it says so and goes back to the queue.
REQUEUES_ITSELF = """
trap 'echo saved; scontrol requeue $SLURM_JOB_ID; exit' USR2
echo attempt ${SLURM_RESTART_COUNT:-0}
while sleep 0.2; do :; done
"""


@pytest.fixture
def script() -> ModuleType:
    """slurm/dev_cluster as a module."""
    loader = importlib.machinery.SourceFileLoader("dev_cluster_script", str(DEV_CLUSTER))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def is_alive(pid: int) -> bool:
    """Whether the process is there and not a zombie that waits for its parent."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_two_nodes_and_two_partitions_are_ready(slurm_cluster: SlurmCluster) -> None:
    lines = slurm_cluster.run("sinfo", "--noheader", "--Node", "--format=%N %P %T").splitlines()
    assert sorted(lines) == ["n1 main* idle", "n1 priority idle", "n2 main* idle", "n2 priority idle"]
    status = dev_cluster("status")
    assert status.returncode == 0
    assert "slurmdbd" in status.stdout


def test_a_second_up_leaves_all_running(slurm_cluster: SlurmCluster) -> None:
    services = ["munged", "mariadbd", "slurmdbd", "slurmctld", "n1", "n2"]
    before = [slurm_cluster.pid(service) for service in services]
    slurm_cluster.up()
    assert [slurm_cluster.pid(service) for service in services] == before


def test_a_job_runs_on_both_nodes(slurm_cluster: SlurmCluster) -> None:
    names = slurm_cluster.run("srun", "--nodes=2", "--ntasks-per-node=1", "printenv", "SLURMD_NODENAME")
    assert sorted(names.split()) == ["n1", "n2"]


def test_two_ranks_on_two_nodes_reduce_with_gloo(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "all_reduce.py").write_text(ALL_REDUCE)
    ranks = (
        "export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS MASTER_PORT=29531 OMP_NUM_THREADS=1;"
        f"MASTER_ADDR=n1 exec {sys.executable} all_reduce.py"
    )
    printed = slurm_cluster.run("srun", "--nodes=2", "--ntasks-per-node=1", "sh", "-c", ranks, cwd=tmp_path)
    assert sorted(printed.splitlines()) == ["0 2 3.0", "1 2 3.0"]


def test_accounting_knows_how_array_and_dependent_jobs_ended(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    array = slurm_cluster.submit(tmp_path, "exit $SLURM_ARRAY_TASK_ID", "--array=0,3", "--ntasks=1")
    after = slurm_cluster.submit(tmp_path, "true", f"--dependency=afterany:{array}", "--ntasks=1")
    ends = {after: "COMPLETED", f"{array}_0": "COMPLETED", f"{array}_3": "FAILED"}
    wait_until(lambda: {job: slurm_cluster.state(job) for job in ends} == ends, f"ends {ends}")


def test_a_requeued_job_is_back_within_a_minute(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    job = slurm_cluster.submit(tmp_path, REQUEUES_ITSELF, "--nodes=2")
    output = tmp_path / f"{job}.out"
    wait_until(lambda: output.exists() and "attempt 0" in output.read_text(), "the first attempt")
    slurm_cluster.run("scontrol", "requeue", job)
    wait_until(lambda: "attempt 1" in output.read_text(), "the second attempt")
    slurm_cluster.run("scancel", job)


def test_priority_preempts_main_with_the_signal_asked_for(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    job = slurm_cluster.submit(tmp_path, REQUEUES_ITSELF, "--nodes=2", "--exclusive", "--signal=B:USR2@90")
    output = tmp_path / f"{job}.out"
    wait_until(lambda: output.exists() and "attempt 0" in output.read_text(), "the first attempt")
    slurm_cluster.run("srun", "--partition=priority", "--nodes=2", "--exclusive", "true")
    assert "saved" in output.read_text()
    wait_until(lambda: "attempt 1" in output.read_text(), "the second attempt")
    slurm_cluster.run("scancel", job)


def test_a_killed_node_takes_its_jobs_along_and_up_brings_it_back(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    # Detached as far as a process can be: only a machine's end ends it.
    detached = "setsid nohup sleep 1000 > /dev/null 2>&1 & echo $! > pid; wait"
    job = slurm_cluster.submit(tmp_path, detached, "--nodelist=n2", "--ntasks=1")
    pid_file = tmp_path / "pid"
    wait_until(lambda: pid_file.exists() and pid_file.read_text().strip(), "the job's start")
    pid = int(pid_file.read_text())
    assert is_alive(pid)
    slurm_cluster.kill("n2")
    wait_until(lambda: not is_alive(pid), "the end of the job's process")
    assert dev_cluster("status").returncode == 1
    slurm_cluster.up()
    assert dev_cluster("status").returncode == 0
    slurm_cluster.run("scancel", job)


def test_accounting_and_controller_come_back_with_what_they_knew(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    job = slurm_cluster.submit(tmp_path, "until [ -e go ]; do sleep 0.2; done", "--nodes=2")
    wait_until(lambda: slurm_cluster.state(job) == "RUNNING", "the job's start")
    os.kill(slurm_cluster.pid("slurmctld"), signal.SIGTERM)
    slurm_cluster.kill("slurmdbd")
    wait_until(lambda: not (STATE / "pids/slurmctld").read_text(), "the controller's end")
    assert dev_cluster("status").returncode == 1
    slurm_cluster.up()
    (tmp_path / "go").touch()
    wait_until(lambda: slurm_cluster.state(job) == "COMPLETED", "the job's end")


def test_down_ends_what_up_started_and_nothing_else(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    if slurm_cluster.is_borrowed:
        skip("the cluster was up before the tests and may be in use")
    keepers = [psutil.Process(slurm_cluster.pid(name)).parent() for name in ("munged", "slurmctld", "n1", "n2")]
    slurm_cluster.submit(tmp_path, "touch started; exec srun sleep 1000", "--nodes=2")
    wait_until((tmp_path / "started").exists, "the job's start")

    def ours() -> list[psutil.Process]:
        return [p for keeper in keepers if keeper for p in (keeper, *keeper.children(recursive=True))]

    def has_started() -> bool:
        sleeping = {process.pid for process in psutil.process_iter(["name"]) if process.info["name"] == "sleep"}
        return not sleeping.isdisjoint(process.pid for process in ours())

    wait_until(has_started, "the job's step")
    before = ours()
    bystander = subprocess.Popen(["sleep", "1000"], env=slurm_cluster.environment)
    try:
        assert dev_cluster("down").returncode == 0
        assert [process for process in before if is_alive(process.pid)] == []
        assert bystander.poll() is None
        assert not STATE.exists()
        assert "dev_cluster" not in Path("/etc/hosts").read_text()
        assert dev_cluster("status").returncode == 1
    finally:
        bystander.kill()
        bystander.wait()
        slurm_cluster.up()


def test_without_root_or_packages_it_says_what_to_type(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(shutil, "which", lambda program, path: None if program == "munged" else program)
    with pytest.raises(script.CannotRunHereError, match=r"sudo sh -c 'apt-get update .* munge && .*dev_cluster up'"):
        script.install_missing()


def test_the_nodes_names_come_into_hosts_once_and_go(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hosts = tmp_path / "hosts"
    monkeypatch.setattr(script, "HOSTS", hosts)
    hosts.write_text("127.0.0.1 localhost")  # no end of line
    script.name_nodes()
    script.name_nodes()
    assert hosts.read_text() == "127.0.0.1 localhost\n" + script.HOSTS_LINE
    script.forget_nodes()
    assert hosts.read_text() == "127.0.0.1 localhost\n"
    hosts.write_text("192.0.2.7 n1\n")
    with pytest.raises(script.CannotRunHereError, match="another address"):
        script.name_nodes()


@pytest.mark.parametrize("arguments", [[], ["restart"], ["up", "down"]])
def test_a_command_it_does_not_know_gets_the_usage(arguments: list[str]) -> None:
    done = subprocess.run([DEV_CLUSTER, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "dev_cluster up" in done.stderr
