"""Submission and waiting on a real Slurm: all trainings at once, few queries, held jobs, `jobs`, `cancel`, `doctor`."""

import itertools
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
from conftest import Checkout
from slurm_cluster import ON_SLURM, SlurmCluster, suspend_trainings, wait_until

from pipeline.launch.slurm_status import POLL_S

pytest_plugins = "slurm_cluster"
pytestmark = ON_SLURM

CLASSIFIERS = Path("runs/train_classifier")
COUNTING = """#!/bin/sh
date +%s.%N >> "$QUERIES"
exec {program} "$@"
"""


@pytest.fixture(scope="module")
def checkout_on_slurm(slurm_cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    """A checkout with both data sets made, two variants and two seeds of S12 to train; its squeue writes a log."""
    checkout = Checkout(tmp_path_factory.mktemp("jobs"))
    programs = checkout.folder / "programs"
    programs.mkdir()
    found = subprocess.run(["which", "squeue"], capture_output=True, text=True, check=True).stdout.strip()
    (programs / "squeue").write_text(COUNTING.format(program=found))
    (programs / "squeue").chmod(0o755)
    checkout.environment |= {
        "PIPELINE_CLUSTER": "slurm/dev.yaml",
        "PATH": f"{programs}:{checkout.environment['PATH']}",
        "QUERIES": str(checkout.folder / "queries.txt"),
        "SLURM_CONF": "/run/slurm_dev/slurm.conf",
    }
    variants = "train=[poolformer_s12,poolformer_s24]"
    endless = (
        "classification.recipe.epochs=1000"  # however long the tests take, no training ends before it is cancelled
    )
    checkout.pipeline("compose", "scale=demo", f"classification.{variants}", "ablations.train=[]", endless)
    checkout.run("dvc", "repro", "convert_imagenet", "convert_ade20k")
    yield checkout
    for job in queued(slurm_cluster, checkout):
        slurm_cluster.run("scancel", job)


def queued(cluster: SlurmCluster, checkout: Checkout, *columns: str) -> dict[str, list[str]]:
    """Jobs of this checkout that wait or run: id -> the columns asked for (squeue's letters)."""
    wanted = "|".join(["%i", "%Z", *columns])
    lines = [line.split("|") for line in cluster.run("squeue", "-h", "--array", "-o", wanted).splitlines()]
    return {line[0]: line[2:] for line in lines if line[1] == str(checkout.folder)}


@contextmanager
def started(
    cluster: SlurmCluster, checkout: Checkout, *command: str, output: IO[str] | int = subprocess.DEVNULL
) -> Iterator[subprocess.Popen[str]]:
    """A command in the background; at the end its jobs are cancelled, on which it ends."""
    process = subprocess.Popen(
        command,
        cwd=checkout.folder,
        env=checkout.environment,
        stdout=output,
        text=True,
        bufsize=1,
        # As from a terminal; a test run in the background has SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        for job in queued(cluster, checkout):
            cluster.run("scancel", job)
        process.communicate(timeout=600)
        wait_until(lambda: not queued(cluster, checkout), "an empty queue")


def test_repro_queues_all_trainings_and_asks_rarely(slurm_cluster: SlurmCluster, checkout_on_slurm: Checkout) -> None:
    """Both classifiers as an array, each segmenter behind its own; then three processes wait."""
    checkout = checkout_on_slurm
    with started(slurm_cluster, checkout, "dvc", "repro", output=subprocess.PIPE) as repro:
        look_at_all_that_is_queued(slurm_cluster, checkout, repro)
    assert repro.returncode != 0
    # Accounting may say for a moment that a cancelled job is pending.
    wait_until(lambda: "no job is pending or running" in checkout.pipeline("jobs").stdout, "the end of all jobs")


def look_at_all_that_is_queued(slurm_cluster: SlurmCluster, checkout: Checkout, repro: subprocess.Popen[str]) -> None:
    assert repro.stdout is not None
    while "Running stage 'train_classifier" not in repro.stdout.readline():
        assert repro.poll() is None
    begun = time.monotonic()
    wait_until(lambda: len(queued(slurm_cluster, checkout)) == 4, "four jobs")
    print(f"\nfrom the first training's stage to four jobs in the queue: {time.monotonic() - begun:.1f} s")
    suspend_trainings(*(checkout.folder / CLASSIFIERS / f"poolformer_{size}-0" for size in ("s12", "s24")))
    names = queued(slurm_cluster, checkout, "%j", "%E")
    array = {job: name for job, (name, _) in names.items() if name == "train_classifier"}
    assert {job.partition("_")[2] for job in array} == {"0", "1"}
    behind = {name: after for name, after in names.values() if name.startswith("train_segmenter")}
    (base,) = {job.partition("_")[0] for job in array}
    assert behind["train_segmenter-poolformer_s12-0"].startswith(f"afterok:{base}_0")
    assert behind["train_segmenter-poolformer_s24-0"].startswith(f"afterok:{base}_1")

    others = [
        subprocess.Popen(
            ["python", "-m", "pipeline", "train_classifier", variant, "0"],
            cwd=checkout.folder,
            env=checkout.environment,
            stdout=subprocess.DEVNULL,
        )
        for variant in ("poolformer_s12", "poolformer_s24")
    ]
    queries = checkout.folder / "queries.txt"
    wait_until(lambda: slurm_asked(queries) >= 2, "the start of the others")
    queries.unlink()
    wait_until(lambda: slurm_asked(queries) >= 3, "three queries")
    times = [float(line) for line in queries.read_text().split()]
    # Three processes wait. A query's time is noted by the program that stands in for squeue, which may start late.
    assert min(b - a for a, b in itertools.pairwise(times)) >= POLL_S / 2
    assert len(queued(slurm_cluster, checkout)) == 4  # the others attached

    held = next(job for job, (name, _) in names.items() if name == "train_segmenter-poolformer_s24-0")
    slurm_cluster.run("scontrol", "hold", held)
    wait_until(lambda: "is held" in checkout.pipeline("jobs").stdout, "word of the hold")
    table = checkout.pipeline("jobs").stdout
    rows = {line.split()[0]: line for line in table.splitlines()[1:]}
    assert set(rows) == set(names)
    assert "is held" in rows[held]
    assert f"scontrol release {held}" in rows[held]
    assert "RUNNING" in rows[f"{base}_0"]
    assert "n[1-2]" in rows[f"{base}_0"]

    ended = checkout.pipeline("cancel", "train_classifier", "poolformer_s12-0", "poolformer_s24-0").stdout
    assert ended.count("ended job") == 2
    wait_until(lambda: not queued(slurm_cluster, checkout), "the dependent jobs' end")
    for other in others:
        assert other.wait(timeout=600) == 1


def slurm_asked(queries: Path) -> int:
    """How often squeue was asked."""
    return len(queries.read_text().split()) if queries.exists() else 0


def test_a_job_queued_ahead_that_dies_is_submitted_again_within_a_minute(
    slurm_cluster: SlurmCluster, checkout_on_slurm: Checkout
) -> None:
    """Its batch script is killed, so nobody requeues it, while `dvc repro` waits for another training."""
    checkout = checkout_on_slurm
    folder = checkout.folder / CLASSIFIERS / "poolformer_s24-0"

    def noted() -> str:
        return json.loads((folder / "job.json").read_text())["job_id"] or ""

    with started(slurm_cluster, checkout, "dvc", "repro"):
        wait_until(lambda: len(queued(slurm_cluster, checkout)) == 4, "four jobs")
        suspend_trainings(folder)  # not sooner: a signal for a batch script that has not begun is lost
        wait_until(noted, "its id")
        job = noted()
        slurm_cluster.run("scancel", "--batch", "--signal=KILL", job)
        wait_until(lambda: job not in queued(slurm_cluster, checkout), "its end")
        began = time.monotonic()
        wait_until(lambda: noted() not in ("", job), "another", 240)
        print(f"\nfrom the end of a job queued ahead to another one: {time.monotonic() - began:.0f} s")
        again = noted()

        def waits_for_it() -> bool:
            behind = dict(queued(slurm_cluster, checkout, "%j", "%E").values())
            return behind.get("train_segmenter-poolformer_s24-0", "").startswith(f"afterok:{again}")

        wait_until(waits_for_it, "its segmenter behind it", 240)


def test_one_target_queues_only_what_it_needs(slurm_cluster: SlurmCluster, checkout_on_slurm: Checkout) -> None:
    checkout = checkout_on_slurm
    with started(slurm_cluster, checkout, "dvc", "repro", "evaluate_segmenter@poolformer_s12-0"):
        wait_until(lambda: len(queued(slurm_cluster, checkout)) >= 2, "two jobs")
        time.sleep(2)
        names = {name for (name,) in queued(slurm_cluster, checkout, "%j").values()}
        assert names == {"train_classifier-poolformer_s12-0", "train_segmenter-poolformer_s12-0"}


def test_submit_queues_what_is_stale_and_leaves(slurm_cluster: SlurmCluster, checkout_on_slurm: Checkout) -> None:
    checkout = checkout_on_slurm
    try:
        said = checkout.pipeline("submit", "evaluate_segmenter@poolformer_s12-0").stdout
        assert said.splitlines()[-2:] == [
            f"queued: train_{task} poolformer_s12-0" for task in ("classifier", "segmenter")
        ]
        first = queued(slurm_cluster, checkout, "%j")
        assert sorted(name for (name,) in first.values()) == [
            f"train_{task}-poolformer_s12-0" for task in ("classifier", "segmenter")
        ]
        checkout.pipeline("submit")
        everything = queued(slurm_cluster, checkout)
        assert first.keys() < everything.keys()
        assert len(everything) == 4
        refused = checkout.pipeline("submit", "train_everything", check=False)
        assert "train_everything" in refused.stderr
        assert "Traceback" not in refused.stderr
    finally:
        for job in queued(slurm_cluster, checkout):
            slurm_cluster.run("scancel", job)
        wait_until(lambda: not queued(slurm_cluster, checkout), "an empty queue")


def test_a_command_by_itself_queues_itself(slurm_cluster: SlurmCluster, checkout_on_slurm: Checkout) -> None:
    """And a pending reason is told while it waits."""
    checkout = checkout_on_slurm
    occupying = slurm_cluster.submit(checkout.folder, "sleep 600", "--nodes=2", "--exclusive", "--partition=priority")
    command = ("python", "-m", "pipeline", "train_classifier", "poolformer_s12", "0")
    with started(slurm_cluster, checkout, *command, output=subprocess.PIPE) as stage:
        assert stage.stdout is not None
        while "is pending (Resources" not in (line := stage.stdout.readline()) and "is pending (Priority" not in line:
            assert stage.poll() is None
        assert len(queued(slurm_cluster, checkout)) == 2  # itself, and the occupying job
        stage.send_signal(signal.SIGINT)
        assert stage.wait(timeout=600) == 1
        assert len(queued(slurm_cluster, checkout)) == 2  # Ctrl-C asks nothing of the job
        assert occupying in queued(slurm_cluster, checkout)


def test_doctor_tries_the_cluster_and_names_what_is_wrong(
    slurm_cluster: SlurmCluster, checkout_on_slurm: Checkout
) -> None:
    checkout = checkout_on_slurm
    tried = checkout.pipeline("doctor", "--test-job", SBATCH_PARTITION="gpu").stdout
    assert "SBATCH_PARTITION of the shell mean nothing here" in " ".join(tried.split())
    assert "would accept a job of this profile" in tried
    assert "rank 0" in tried
    assert "n1: CPU, 0 GPUs" in tried
    assert "n2: CPU, 0 GPUs" in tried

    dev = (checkout.folder / "slurm/dev.yaml").read_text()
    for change, complaint in (
        (("partition: main", "partition: gpu"), "gpu is not one of main, priority"),
        (("cpus_per_task: 1", "cpus_per_task: 3"), "0 of 2 nodes have the 3 cores"),
        (("gpus_per_node: 0", "gpus_per_node: 1"), "0 of 2 nodes have the 1 GPUs"),
        (("time_min: 120", "time_min: 120\nmemory_gb: 4000"), "MB of memory"),
        (("time_min: 120", "time_min: 120\nconstraint: a100"), "would refuse a job"),
    ):
        assert change[0] in dev
        (checkout.folder / "slurm/wrong.yaml").write_text(dev.replace(*change))
        done = checkout.pipeline("doctor", check=False, PIPELINE_CLUSTER="slurm/wrong.yaml")
        assert done.returncode == 1
        assert complaint in " ".join(done.stdout.split())


def test_container_set_up_and_environment_reach_the_ranks(
    slurm_cluster: SlurmCluster, checkout_on_slurm: Checkout
) -> None:
    """The container here is a mount namespace of its own, in which /mnt is another one."""
    checkout = checkout_on_slurm
    inside = checkout.folder / "inside.sh"
    inside.write_text('#!/bin/sh\nmount -t tmpfs none /mnt\ntouch "/mnt/$FROM_ENVIRONMENT.$FROM_SETUP"\nexec "$@"\n')
    inside.chmod(0o755)
    dev = (checkout.folder / "slurm/dev.yaml").read_text()
    extra = f"container: unshare --mount {inside}\nsetup: ['export FROM_SETUP=2']\n"
    (checkout.folder / "slurm/contained.yaml").write_text(dev + "  FROM_ENVIRONMENT: one\n" + extra)
    check = checkout.folder / "pipeline/launch/check.py"
    before = check.read_text()
    check.write_text(before.replace('Path("params.yaml").exists()', 'Path("/mnt/one.2").exists()'))
    try:
        done = checkout.pipeline("doctor", "--test-job", PIPELINE_CLUSTER="slurm/contained.yaml")
    finally:
        check.write_text(before)
    assert "rank 1" in done.stdout
    assert "does not see" not in done.stdout
