"""Faults on a real Slurm: each is done to a real two-node training, which must end with an undisturbed run's weights.

It trains S12 on the digits at 32 px, one rank on each node of slurm/dev_cluster, with a checkpoint every 20 steps.
Faults share a job where that keeps them honest. `pytest -s` prints what each cost; docs/cluster.md has a table of it.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Checkout
from slurm_cluster import INTERVAL, ON_SLURM, PROFILE, SlurmCluster, rank_processes, wait_until

pytest_plugins = "slurm_cluster"
pytestmark = ON_SLURM

STEPS = 240
STALL_MIN = 0.5
PATIENCE_S = 600  # two cores may have other work to do
RUN = Path("runs/train_classifier/poolformer_s12-0")
COMMAND = [sys.executable, "-m", "pipeline", "train_classifier", "poolformer_s12", "0"]
REPRO = ("dvc", "repro", "-s", "train_classifier@poolformer_s12-0")


class Training:
    """A checkout with its data, and what can be seen of the training in it."""

    def __init__(self, folder: Path, cluster: SlurmCluster) -> None:
        self.cluster = cluster
        self.checkout = Checkout(folder)
        self.checkout.environment |= {
            "PIPELINE_CLUSTER": "slurm/faults.yaml",
            "SLURM_CONF": "/run/slurm_dev/slurm.conf",
        }
        (folder / "slurm/faults.yaml").write_text(PROFILE)
        self.compose(STEPS)
        self.folder = folder / RUN
        self.outputs: list[Path] = []
        self.started: list[subprocess.Popen[bytes]] = []
        self.forgotten: set[str] = set()  # jobs of runs before

    def compose(self, steps: int) -> None:
        """A small batch: the steps are many, to be disturbed between."""
        recipe = (f"max_steps={steps}", "epochs=10000", "global_batch_size=8")
        settings = [f"classification.recipe.{setting}" for setting in recipe]
        self.checkout.pipeline("compose", "scale=demo", "classification.train=[poolformer_s12]", *settings)

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """A stage, or another command, in the background; its output goes to a file."""
        self.outputs.append(self.checkout.folder / f"output-{len(self.outputs)}.txt")
        with self.outputs[-1].open("w") as stream:
            process = subprocess.Popen(
                command or COMMAND,
                cwd=self.checkout.folder,
                env=self.checkout.environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        self.started.append(process)
        return process

    def finish(self, stage: subprocess.Popen[bytes]) -> None:
        assert stage.wait(timeout=PATIENCE_S) == 0, self.outputs[-1].read_text()

    @property
    def job(self) -> str:
        """The id that Slurm gave it, as soon as the launcher has noted it."""
        file = self.folder / "job.json"
        wait_until(lambda: json.loads(file.read_text())["job_id"] is not None, "the job's id", PATIENCE_S)
        return str(json.loads(file.read_text())["job_id"])

    def log(self) -> str:
        path = self.folder / "log.txt"
        return path.read_text() if path.exists() else ""

    def step(self) -> int:
        """The last step that the history has."""
        path = self.folder / "history.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def resumes(self) -> list[int]:
        """Steps from which attempts went on."""
        return [int(step) for step in re.findall(r"going on from step (\d+)", self.log())]

    def ranks(self) -> dict[int, psutil.Process]:
        """The ranks' processes."""
        return dict(rank_processes(self.job.split("_")[0]))

    def submitted(self) -> set[str]:
        """Every job of this run that Slurm remembers, ended or not."""
        listed = self.cluster.run(
            "squeue", "-h", "-a", "-t", "all", "-o", "%i %Z", "-n", "train_classifier-poolformer_s12-0"
        )
        found = {line.split()[0] for line in listed.splitlines() if line.endswith(str(self.checkout.folder))}
        return found - self.forgotten

    def weights(self) -> bytes:
        return (self.checkout.folder / "models/classifier/poolformer_s12-0.pt").read_bytes()

    def failures(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "failures.jsonl").read_text().splitlines()]

    def assert_nothing_left(self) -> None:
        """No job waits or runs, no rank is alive."""
        wait_until(lambda: not self.cluster.run("squeue", "-h"), "an empty queue", PATIENCE_S)
        assert not self.ranks()


@pytest.fixture(scope="module")
def prepared(slurm_cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    """The checkout with its data."""
    made = Training(tmp_path_factory.mktemp("faults"), slurm_cluster)
    for stage in ("code", "prepare_imagenet", "convert_imagenet", "prepare_weights"):
        made.checkout.pipeline(stage)
    yield made
    print("\n" + "\n".join(COSTS))


@pytest.fixture
def training(prepared: Training, nothing_left: None) -> Iterator[Training]:
    """The same, with no run and no process of the test before, however that ended."""
    prepared.compose(STEPS)
    (prepared.checkout.folder / "slurm/faults.yaml").write_text(PROFILE)
    forget(prepared)
    yield prepared
    for process in prepared.started:
        process.kill()
        process.wait()
    prepared.started.clear()


COSTS: list[str] = []


@pytest.fixture(scope="module")
def undisturbed(prepared: Training) -> bytes:
    """The weights file of a run to which nothing happened."""
    prepared.compose(STEPS)
    forget(prepared)
    prepared.finish(prepared.start())
    assert prepared.resumes() == []
    return prepared.weights()


def forget(training: Training) -> None:
    """The next run is the first again."""
    subprocess.run(["umount", "--quiet", "--lazy", training.folder / "checkpoints"], check=False)
    training.forgotten |= training.submitted()
    shutil.rmtree(training.folder, ignore_errors=True)


def disturb(training: Training, name: str, fault: Callable[[], object]) -> None:
    """Do something to the running training and wait until it goes on; notes steps lost and seconds until it did."""
    attempts, before = len(training.resumes()), training.step()
    wait_until(lambda: training.step() >= before + INTERVAL, f"progress before {name}", PATIENCE_S)
    started = time.monotonic()
    fault()
    wait_until(lambda: len(training.resumes()) > attempts, f"going on after {name}", PATIENCE_S)
    took_s = time.monotonic() - started
    resumed = training.resumes()[-1]
    *_, reached = re.findall(r" step (\d+)/", training.log().rpartition("going on from")[0])
    lost = int(reached) - resumed
    COSTS.append(f"{name} | goes on from step {resumed}, {lost} logged steps lost | {took_s:.0f} s")
    assert lost <= INTERVAL


def test_signals_a_requeue_and_a_lost_rank_cost_at_most_one_interval(training: Training, undisturbed: bytes) -> None:
    """One job: preempted, signalled, requeued, a rank killed, a rank that stands still.

    A `dvc repro` and a stage by itself start it at one moment; the `dvc repro` is killed, and the next collects it.
    """
    cluster = training.cluster
    (training.checkout.folder / "slurm/faults.yaml").write_text(PROFILE + f"stall_min: {STALL_MIN}\n")
    repro, stage = training.start(*REPRO), training.start()
    wait_until(lambda: training.step() >= INTERVAL, "the first steps", PATIENCE_S)
    job = training.job

    preempting = ("srun", "--partition=priority", "--nodes=2", "--exclusive", "true")
    disturb(training, "preemption by another job", lambda: cluster.run(*preempting))
    assert "SIGUSR2: stopping after this step" in training.log()
    repro.kill()
    repro.wait()
    assert cluster.run("squeue", "-h", "-o", "%i") == job
    disturb(training, "scancel --signal=USR2", lambda: cluster.run("scancel", "--signal=USR2", job))
    disturb(training, "scontrol requeue", lambda: cluster.run("scontrol", "requeue", job))
    disturb(training, "kill -9 of one rank", lambda: training.ranks()[1].kill())
    assert "rank 1 on n2 exited without reporting an error: Killed" in training.failures()[0]["message"]
    disturb(training, f"kill -STOP of a rank, stall_min: {STALL_MIN}", lambda: training.ranks()[1].suspend())
    assert f"no step for {STALL_MIN} min; all threads of rank 0" in training.log()
    assert "in train" in training.log().partition("all threads of rank 0")[2], "the stacks"
    assert f"rank 0 on n1: StallError: no step for {STALL_MIN} min" in training.failures()[-1]["message"]

    repro = training.start(*REPRO)
    wait_until(lambda: "attached to slurm job" in training.outputs[-1].read_text(), "the attachment", PATIENCE_S)
    training.finish(repro)
    training.finish(stage)
    assert training.submitted() == {job}
    assert training.weights() == undisturbed
    training.assert_nothing_left()


def test_a_launcher_killed_while_it_submits_leaves_one_job_that_is_found(training: Training) -> None:
    """slurmctld does not answer; the launcher is killed while sbatch waits for it, which then submits after all."""
    cluster = training.cluster
    controller = cluster.pid("slurmctld")
    os.kill(controller, signal.SIGSTOP)
    try:
        launcher = training.start()
        wait_until(lambda: "sbatch" in names_of_children(launcher.pid), "sbatch", PATIENCE_S)
        launcher.kill()
        launcher.wait()
        assert json.loads((training.folder / "job.json").read_text())["job_id"] is None
        second = training.start()
        time.sleep(2)
    finally:
        os.kill(controller, signal.SIGCONT)
    wait_until(lambda: "attached to slurm job" in training.outputs[-1].read_text(), "the attachment", PATIENCE_S)
    assert training.submitted() == {training.job}
    COSTS.append("kill -9 of the launcher while it submits | the next attaches to the job that sbatch made | -")

    # The same job goes on to lose a rank three times before its first checkpoint, with no accounting.
    cluster.kill("slurmdbd")
    killed: set[int] = set()
    while len(killed) < 3:
        wait_until(lambda: kill_once(training.ranks().get(1), killed), "a rank to kill", PATIENCE_S)
    assert second.wait(timeout=PATIENCE_S) == 1
    said = training.outputs[-1].read_text()
    assert (
        "failed 3 times without getting beyond step 0: rank 1 on n2 exited without reporting an error: Killed" in said
    )
    assert "log.out" in said
    assert "Traceback" not in said
    assert training.submitted() == {training.job}
    COSTS.append("a rank that dies three times without progress, no accounting | the stage fails, saying why | -")


def test_a_full_disk_a_cut_checkpoint_and_a_cancelled_job(training: Training) -> None:
    """The disk has room for one checkpoint; with more room it goes on; cancelled; the newest checkpoint then cut."""
    checkpoints = training.folder / "checkpoints"
    stage = training.start()
    wait_until(lambda: (training.folder / "job.json").exists(), "the submission", PATIENCE_S)
    checkpoints.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "none", checkpoints], check=True)
    try:
        assert stage.wait(timeout=PATIENCE_S) == 1
        said = training.outputs[-1].read_text()
        assert "No space left on device" in said
        assert "free some space" in said
        assert [path.name.split("-")[1] for path in checkpoints.glob("*.pt")] == [str(INTERVAL)]
        assert training.submitted() == {training.job}

        subprocess.run(["mount", "-o", "remount,size=1g", checkpoints], check=True)
        started = time.monotonic()
        stage = training.start()
        wait_until(lambda: training.step() >= 3 * INTERVAL, "progress with more room", PATIENCE_S)
        assert training.resumes() == [INTERVAL]
        COSTS.append(f"full disk, then room | goes on from step {INTERVAL} | {time.monotonic() - started:.0f} s")

        done = training.checkout.pipeline("cancel", "train_classifier", "poolformer_s12-0")
        assert "ended job" in done.stdout
        assert stage.wait(timeout=PATIENCE_S) == 1
        assert "was cancelled" in training.outputs[-1].read_text()
        training.assert_nothing_left()
        (before, _), (newest, cut) = sorted((int(path.name.split("-")[1]), path) for path in checkpoints.glob("*.pt"))
        os.truncate(cut, 1_000_000)
        started = time.monotonic()
        stage = training.start()
        wait_until(lambda: training.resumes() == [before], "going on from the checkpoint before", PATIENCE_S)
        COSTS.append(f"checkpoint of step {newest} cut short | from {before} | {time.monotonic() - started:.0f} s")
        assert f"{cut.name} is damaged" in training.log()
        training.checkout.pipeline("cancel", "train_classifier", "poolformer_s12-0")
        assert stage.wait(timeout=PATIENCE_S) == 1
    finally:
        subprocess.run(["umount", "--lazy", checkpoints], check=False)
    training.assert_nothing_left()


CRASHING = """
import atexit, os, threading, time
if "SLURM_STEP_ID" in os.environ and "submitit" in " ".join(os.sys.orig_argv):
    atexit.register(os.abort)
    def abort_when_done():
        while not os.path.exists("{done}"):
            time.sleep(0.001)
        os.abort()
    if not os.path.exists("{done}"):
        threading.Thread(target=abort_when_done, daemon=True).start()
"""


def test_a_crash_after_the_result_and_a_requeue_of_a_finished_job_train_nothing_again(training: Training) -> None:
    """Every rank would abort at the interpreter's exit, and does in another thread as soon as the run is done."""
    crash = training.checkout.folder / "crash/sitecustomize.py"
    crash.parent.mkdir(exist_ok=True)
    crash.write_text(CRASHING.format(done=training.folder / "done"))
    profile = PROFILE + f"  PYTHONPATH: {crash.parent}\n"
    (training.checkout.folder / "slurm/faults.yaml").write_text(profile)
    training.compose(INTERVAL)
    try:
        training.finish(training.start())
        job, weights = training.job, training.weights()
        ended = "COMPLETED"
        wait_until(lambda: training.cluster.state(job) == ended, "the job's good end", PATIENCE_S)
        requeued = training.log().count("== attempt")
        assert requeued == 1, training.log()
        training.cluster.run("scontrol", "requeue", job)
        wait_until(lambda: "is already done" in training.log(), "the second attempt", PATIENCE_S)
        wait_until(lambda: training.cluster.state(job) == ended, "the job's second end", PATIENCE_S)
    finally:
        (training.checkout.folder / "slurm/faults.yaml").write_text(PROFILE)
    assert training.submitted() == {job}
    assert not (training.folder / "failures.jsonl").exists()
    assert len((training.folder / "history.jsonl").read_text().splitlines()) == 1
    assert (training.folder / "out/weights.pt").read_bytes() == weights
    assert "going on from" not in training.log()


BROKEN = "\n\ndef cosine_by_epoch(*_, **__):\n    return 0.0\n"


def test_a_job_runs_the_code_it_was_queued_with_and_a_duplicate_touches_nothing(training: Training) -> None:
    """The learning-rate rule is broken while the job is pending, and again between two attempts."""
    training.compose(4 * INTERVAL)
    cluster, schedule = training.cluster, training.checkout.folder / "pipeline/train/schedule.py"
    original = schedule.read_text()
    occupying = cluster.submit(training.checkout.folder, "sleep 600", "--nodes=2", "--exclusive", "-p", "priority")
    stage = training.start()
    wait_until(lambda: (training.folder / "log.txt").is_symlink(), "the submission", PATIENCE_S)
    job = training.job
    try:
        schedule.write_text(original + BROKEN)
        cluster.run("scancel", occupying)
        wait_until(lambda: training.step() >= INTERVAL, "the first steps", PATIENCE_S)
        schedule.write_text(original + BROKEN.replace("0.0", "1e3"))
        cluster.run("scancel", "--signal=USR2", job)
        script = str(training.folder / f"jobs/{job}_submission.sh")
        duplicate = cluster.run("sbatch", "--parsable", script, cwd=training.checkout.folder)
        refused = training.checkout.pipeline("convert_imagenet", check=False)
        assert refused.returncode == 1
        assert f"cannot be converted again while jobs read it (job {job} of train_classifier" in " ".join(
            refused.stderr.split()
        )
        training.finish(stage)
        weights = training.weights()
        lines = (training.folder / "history.jsonl").read_text().splitlines()
        rates = {json.loads(line)["learning_rate"] for line in lines}
        assert 0 < min(rates) <= max(rates) < 1
        said = training.checkout.pipeline("why", "train_classifier", "poolformer_s12", "0").stdout
        assert "is done; one made now would differ in" in said
        assert "code: pipeline.train.schedule:cosine_by_epoch changed" in said
    finally:
        schedule.write_text(original)
    wait_until(lambda: cluster.state(duplicate) in ("FAILED", "COMPLETED"), "the duplicate's end", PATIENCE_S)
    training.checkout.pipeline("train_classifier", "poolformer_s12", "0")  # collects what is there
    assert training.weights() == weights
    assert training.submitted() == {job, duplicate}
    assert training.log().count("== attempt") == 2
    assert "nothing that its result depends on has changed" in (
        training.checkout.pipeline("why", "train_classifier", "poolformer_s12", "0").stdout
    )
    training.assert_nothing_left()


@contextmanager
def profile(training: Training, text: str) -> Iterator[None]:
    """Another cluster profile for one test."""
    place = training.checkout.folder / "slurm/faults.yaml"
    place.write_text(text)
    try:
        yield
    finally:
        place.write_text(PROFILE)


BROKEN_NODE = '[ "$SLURMD_NODENAME" = n1 ] && export PYTHONHOME=/broken'


def test_a_node_on_which_a_job_fails_is_not_taken_again(training: Training) -> None:
    """Python starts on n2 alone. Later a rank is killed there, with Python on n1 whole again."""
    one_node = PROFILE.replace("nodes: 2", "nodes: 1")
    training.compose(100_000)
    with profile(training, one_node + f"setup: ['{BROKEN_NODE}']\n"):
        stage = training.start()
        wait_until(lambda: training.step() >= INTERVAL, "steps on the other node", PATIENCE_S)
        broken, job = sorted(training.submitted(), key=int)
        assert training.cluster.state(broken) == "FAILED"
        assert training.cluster.run("squeue", "-h", "-o", "%N", f"--jobs={job}") == "n2"
        assert [failure["node"] for failure in training.failures()] == ["n1"]
        training.checkout.pipeline("cancel", "train_classifier", "poolformer_s12-0")
        assert stage.wait(timeout=PATIENCE_S) == 1
    with profile(training, one_node):
        stage = training.start()
        where = ("squeue", "-h", "-o", "%N", "-n", "train_classifier-poolformer_s12-0")
        wait_until(lambda: len(training.resumes()) == 1 and training.ranks(), "going on", PATIENCE_S)
        before = training.cluster.run(*where)
        disturb(training, "kill -9 of the only rank, another node up", lambda: training.ranks()[0].kill())
        assert {before, training.cluster.run(*where)} == {"n1", "n2"}
        training.checkout.pipeline("cancel", "train_classifier", "poolformer_s12-0")
        assert stage.wait(timeout=PATIENCE_S) == 1
    training.assert_nothing_left()


def test_a_controller_is_away_and_a_node_is_gone_for_good(training: Training) -> None:
    """A long run on one or two nodes, which is cancelled at the end."""
    cluster = training.cluster
    training.compose(100_000)
    with profile(training, PROFILE.replace("nodes: 2", "nodes: 1..2")):
        stage = training.start()
        wait_until(lambda: training.step() >= INTERVAL, "the first steps", PATIENCE_S)
        job = training.job

        started, before = time.monotonic(), training.step()
        os.kill(cluster.pid("slurmctld"), signal.SIGTERM)
        cluster.kill("slurmdbd")
        wait_until(lambda: "Slurm does not answer" in training.outputs[-1].read_text(), "word of it", PATIENCE_S)
        wait_until(lambda: training.step() > before, "steps meanwhile", PATIENCE_S)
        cluster.up()
        COSTS.append(f"slurmctld and slurmdbd away | trains on | {time.monotonic() - started:.0f} s away")
        assert training.submitted() == {job}
        assert len(training.ranks()) == 2
        try:
            disturb(training, "a node that is lost for good, nodes: 1..2", lambda: cluster.kill("n2"))
            before = training.step()
            wait_until(lambda: training.step() >= before + INTERVAL, "steps on one node", PATIENCE_S)
            assert len(training.ranks()) == 1
        finally:
            cluster.up()
        used = [json.loads(line)["ranks"] for line in (training.folder / "history.jsonl").read_text().splitlines()]
        assert used == sorted(used, reverse=True)
        assert set(used) == {1, 2}
        training.checkout.pipeline("cancel", "train_classifier", "poolformer_s12-0")
        assert stage.wait(timeout=PATIENCE_S) == 1
        assert f"job {job} of train_classifier/poolformer_s12-0 was cancelled" in training.outputs[-1].read_text()
    training.assert_nothing_left()


def test_a_job_gives_back_nodes_over_which_its_batch_cannot_be_spread(training: Training) -> None:
    settings = ("scale=demo", "classification.train=[poolformer_s12]", "classification.recipe.max_steps=2")
    training.checkout.pipeline("compose", *settings, "classification.recipe.global_batch_size=33")
    with profile(training, PROFILE.replace("nodes: 2", "nodes: 1..3")):
        training.finish(training.start())
    assert "the batch cannot be spread over 2 nodes: giving back all but 1" in training.log()
    assert json.loads((training.folder / "history.jsonl").read_text())["ranks"] == 1
    training.assert_nothing_left()


def kill_once(process: psutil.Process | None, killed: set[int]) -> bool:
    """kill -9 of a process that is not in `killed`."""
    if process is None or process.pid in killed:
        return False
    process.kill()
    killed.add(process.pid)
    return True


def names_of_children(pid: int) -> list[str]:
    try:
        return [child.name() for child in psutil.Process(pid).children()]
    except psutil.Error:
        return []
