"""What is retried, where and how often: errors of nodes against errors of the run, and what ranks must agree on."""

import json
import os
import subprocess
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline import paths
from pipeline.cluster import Profile
from pipeline.errors import UserError
from pipeline.launch import agreement, attempts, record, slurm, worker
from pipeline.launch.attempts import (
    BACK_OFF_S,
    MAX_FAILURES,
    MAX_TRANSIENT,
    Attempt,
    InfrastructureError,
    Next,
    StallError,
)
from pipeline.launch.fingerprint import Work
from pipeline.launch.jobs import run_job
from pipeline.launch.record import Job

SLURM_PROFILE = Profile(kind="slurm", gpus_per_node=0, cpus_per_task=1)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    (tmp_path / "jobs").mkdir()
    return tmp_path


def leave_error(folder: Path, restart: int, error: Exception, node: str = "n1", rank: int = 0) -> bool:
    """An attempt that fails on a node; whether there is another."""
    attempt = Attempt("7", restart)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURMD_NODENAME", node)
        with pytest.raises((SystemExit, type(error))), attempts.errors_of_rank(folder, attempt, rank):
            raise error
    return attempts.fail(folder, attempt, folder / "jobs/7_0_log.out")


def test_errors_of_the_infrastructure_have_a_budget_and_a_back_off_of_their_own(run_folder: Path) -> None:
    unmounted = InfrastructureError("train.beton is not there on n1: is its file system mounted?")
    delays = []
    for restart in range(MAX_TRANSIENT - 1):
        assert leave_error(run_folder, restart, unmounted)
        delays.append(Next.of(run_folder).delay_s)
    assert delays == [*BACK_OFF_S, *[BACK_OFF_S[-1]] * (MAX_TRANSIENT - 1 - len(BACK_OFF_S))]
    for restart in range(MAX_FAILURES - 1):
        assert leave_error(run_folder, 100 + restart, ValueError("bad pixel")), "the run's own are counted apart"
        assert Next.of(run_folder).delay_s == 0
    assert not leave_error(run_folder, 200, unmounted)
    assert record.failures(run_folder)[-1].message == f"rank 0 on n1: {unmounted}"
    assert not leave_error(run_folder, 201, ValueError("bad pixel"))


def test_the_doctors_test_job_is_not_retried(run_folder: Path) -> None:
    (run_folder / "work.json").write_text('{"is_retried": false}')
    assert not leave_error(run_folder, 0, InfrastructureError("torch finds no GPU"))
    assert record.failures(run_folder)[-1].message == "rank 0 on n1: torch finds no GPU"


def test_a_job_waits_for_the_result_that_it_starts_from_and_that_a_file_system_shows_late(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "STALE_S", 0)
    upstream = run_folder / "upstream"
    with pytest.raises(UserError, match="does not contain the result that this job depends on"):
        worker._await_done(upstream, "ab")
    monkeypatch.setattr(worker, "STALE_S", 60)

    def appear() -> None:
        upstream.mkdir()
        (upstream / "done").write_text("ab")

    Timer(0.5, appear).start()
    worker._await_done(upstream, "ab")


def test_what_a_killed_process_left_of_a_link_is_in_nobodys_way(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process ids are alike in containers; names are drawn."""
    (run_folder / f".log.{os.getpid()}").symlink_to("gone")
    for _ in range(2):
        record.write_job(run_folder, Job("slurm", "t", str(run_folder / "jobs"), {}, 0.0, job_id="7"))
    assert (run_folder / "log.txt").readlink() == Path("jobs/7_0_log.out")


def test_a_node_on_which_a_run_failed_is_avoided_until_it_makes_progress(run_folder: Path) -> None:
    leave_error(run_folder, 0, ValueError("CUDA error: uncorrectable ECC error"), "n3")
    leave_error(run_folder, 1, InfrastructureError("no GPU"), "n2")
    assert Next.of(run_folder).avoid == ("n2", "n3")
    (run_folder / "checkpoints").mkdir()
    (run_folder / "checkpoints/step-20-0123456789abcdef.pt").touch()
    assert Next.of(run_folder) == Next(0, ())
    leave_error(run_folder, 2, RuntimeError("[gloo] Connection closed by peer"), "n1")
    leave_error(run_folder, 3, StallError("no step for 30 min"), "n1")
    assert Next.of(run_folder).avoid == (), "neither says which rank was the cause"


def parameters(start: Next, profile: Profile) -> dict[str, Any]:
    sizes = [int(profile.nodes)]
    made = slurm._parameters(Path("jobs"), "t", profile, Path("code"), "n", None, start, sizes)
    return dict(made["additional_parameters"])


def test_a_resubmission_waits_and_excludes_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "ask", lambda command, extra: "n1\nn2\n")
    start = Next(300, ("n1",))
    assert parameters(start, SLURM_PROFILE) == {
        "requeue": True,
        "propagate": "NONE",
        "begin": "now+300",
        "exclude": "n1",
    }
    with_own = SLURM_PROFILE.model_copy(update={"additional": {"exclude": "n[7-9]"}})
    assert parameters(start, with_own)["exclude"] == "n[7-9],n1"
    both = SLURM_PROFILE.model_copy(update={"nodes": 2})
    assert "exclude" not in parameters(start, both), "it would wait for ever"


@pytest.mark.parametrize(
    ("asked", "updates"),
    [
        ("", []),
        ("60 \n", ["StartTime=now+60"]),
        ("0 n1,n2\n", ["StartTime=now+0 ExcNodeList=n1,n2"]),
        ("300 n1,n2,n3\n", ["StartTime=now+300"]),  # none would be left
    ],
)
def test_the_batch_script_requeues_elsewhere_and_later(run_folder: Path, asked: str, updates: list[str]) -> None:
    """Its lines after srun, with programs in place of Slurm's and a scontrol requeue that signals the script."""
    programs = {
        "scontrol": 'case $1 in show) echo JobState=RUNNING;; requeue) kill -TERM $PPID;; *) echo "$*";; esac\n',
        "sinfo": "printf 'n1\\nn2\\nn3\\nn2\\n'\n",
    }
    for name, text in programs.items():
        (run_folder / name).write_text(f"#!/bin/bash\n{text}")
        (run_folder / name).chmod(0o755)
    (run_folder / "jobs/7.again").write_text(asked)
    script = [
        "trap : TERM",
        "id=7",
        f"jobs={run_folder}/jobs",
        "true",
        *slurm._afterwards(run_folder, SLURM_PROFILE, [1]),
    ]
    variables = {
        "PATH": f"{run_folder}:/usr/bin:/bin",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_PARTITION": "p",
    }
    done = subprocess.run(["bash", "-c", "\n".join(script)], env=variables, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.returncode == 0
    assert done.stdout.splitlines() == [f"update JobId=7 {update}" for update in updates]
    assert not (run_folder / "jobs/7.again").exists()


@pytest.mark.parametrize(("given", "used"), [(8, 8), (7, 4), (3, 2), (2, 2)])
def test_a_job_gives_back_the_nodes_over_which_its_batch_cannot_be_spread(
    run_folder: Path, given: int, used: int
) -> None:
    scontrol = run_folder / "scontrol"
    scontrol.write_text('#!/bin/bash\necho "$*" >&2\necho export SLURM_JOB_NODELIST=fewer > slurm_job_7_resize.sh\n')
    scontrol.chmod(0o755)
    lines = [
        "set -e",
        *slurm._with_usable_nodes([2, 4, 8]),
        "echo $SLURM_NNODES $SLURM_JOB_NUM_NODES $SLURM_JOB_NODELIST",
    ]
    variables = {
        "PATH": f"{run_folder}:/usr/bin:/bin",
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": str(given),
        "SLURM_JOB_NUM_NODES": str(given),
        "SLURM_JOB_NODELIST": "all",
    }
    done = subprocess.run(["bash", "-c", "\n".join(lines)], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{used} {used} {'all' if used == given else 'fewer'}"
    assert done.stderr.strip() == ("" if used == given else f"update JobId=7 NumNodes={used}")


def test_a_range_of_nodes_asks_for_no_number_of_tasks() -> None:
    """With one, Slurm gives the fewest nodes whatever is free."""
    profile = Profile(kind="slurm", nodes="2..8", gpus_per_node=4, cpus_per_task=6)
    made = slurm._parameters(Path("jobs"), "t", profile, Path("code"), "n", None, Next(), [2, 4, 8])
    assert made["additional_parameters"]["nodes"] == "2-8"
    assert made["cpus_per_task"] == 24
    assert "ntasks_per_node" not in made
    assert "--ntasks-per-node=4" in made["srun_args"]
    assert "export SRUN_CPUS_PER_TASK=6" in made["setup"]


@pytest.mark.parametrize(("line", "goes_on"), [("false", False), ("[ a = b ] && export X=1", True), ("true", True)])
def test_a_set_up_line_that_fails_ends_the_attempt_and_names_the_node(
    run_folder: Path, line: str, goes_on: bool
) -> None:
    """The batch script's lines before srun."""
    profile = SLURM_PROFILE.model_copy(update={"setup": (line, "echo later")})
    (run_folder / "t.pkl").touch()
    lines = [*slurm._before(run_folder, "t", profile, run_folder, [1]), "false", "echo srun comes here"]
    variables = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1", "SLURM_CPUS_PER_TASK": "1"}
    done = subprocess.run(["bash", "-c", "\n".join(lines)], env=variables, capture_output=True, text=True)
    assert ("srun comes here" in done.stdout) is goes_on, done.stderr
    assert ("later" in done.stdout) is goes_on
    log = run_folder / "jobs/7_0_log.out"
    log.write_text(done.stdout)
    attempts.fail(run_folder, Attempt("7", 0), log, "it ended as FAILED")
    (failure,) = record.failures(run_folder)
    assert failure.message.startswith("it ended as FAILED" if goes_on else "set-up failed on n1: a line of")
    assert failure.node == ("" if goes_on else "n1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_job_that_asked_for_gpus_does_not_run_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    profile = Profile(kind="local", gpus_per_node=1, cpus_per_task=1)
    work = Work("train_something", "gpu", "pipeline.launch.check:report", {"nonce": "1"})
    with pytest.raises(UserError, match=r"asked for 1 GPUs, and torch finds none on .*gpus_per_node: 0"):
        run_job(work, {}, profile=profile)
    assert not (paths.run("train_something", "gpu") / "done").exists()


def agree(*ranks: dict[str, str], gpus: int = 0) -> None:
    """As the last of these ranks, the others having written theirs."""
    store = dist.HashStore()
    for rank, own in enumerate(ranks):
        store.set(f"facts of {rank}", json.dumps(own))
    profile = Profile(kind="slurm", gpus_per_node=gpus, cpus_per_task=1)
    agreement.agree(store, len(ranks) - 1, len(ranks), ranks[-1], profile)


def test_ranks_agree_on_device_precision_and_versions() -> None:
    one = {"node": "n1", "device": "A100", "gpu": "a", "precision": "bf16", "torch": "2.15.0"}
    agree(one, one | {"node": "n2", "gpu": "b"}, gpus=1)
    other = {"node": "n2", "device": "V100", "gpu": "c", "precision": "fp32", "torch": "2.15.0"}
    with pytest.raises(InfrastructureError, match="n1 and rank 1 on n2 differ in device A100 and V100; precision bf16"):
        agree(one, other, gpus=1)
    with pytest.raises(InfrastructureError, match=r"torch 2\.15\.0 and 2\.14\.0"):
        agree(one, one | {"torch": "2.14.0"}, gpus=1)
    with pytest.raises(InfrastructureError, match="ranks 0, 1 on n1 see one GPU only, and 2 were asked for"):
        agree(one, one, gpus=2)
    agree({"node": "n1", "device": "CPU"}, {"node": "n1", "device": "CPU"})


def test_a_later_attempt_computes_in_the_precision_of_the_first(run_folder: Path) -> None:
    own = {"node": "n1", "device": "A100", "gpu": "a", "precision": "bf16", "torch": "2.15.0"}
    agreement.hold_to(run_folder, Attempt("7", 0), own)
    agreement.hold_to(run_folder, Attempt("7", 1), own | {"precision": "fp32"})  # no step was taken yet
    (run_folder / "checkpoints").mkdir()
    (run_folder / "checkpoints/step-20-0123456789abcdef.pt").touch()
    agreement.hold_to(run_folder, Attempt("7", 2), own | {"precision": "fp32", "device": "V100"})
    with pytest.raises(InfrastructureError, match=r"first 20 steps were computed in fp32, and A100 on n1 .* in bf16"):
        agreement.hold_to(run_folder, Attempt("7", 3), own)
    assert [entry["attempt"] for entry in record.software(run_folder)] == ["7.0", "7.1", "7.2"]


def test_the_precision_is_found_among_the_arguments_of_trainings_and_evaluations() -> None:
    own = agreement.facts(SLURM_PROFILE, 0, {"recipe": {"precision": "bf16"}})
    assert own["precision"] == "bf16"
    assert agreement.facts(SLURM_PROFILE, 0, {"settings": {"precision": "fp32"}})["precision"] == "fp32"
    assert "precision" not in agreement.facts(SLURM_PROFILE, 0, {"nonce": "1"})
