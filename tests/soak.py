"""Faults at random on a real Slurm: `make soak` (SOAK_S=seconds SEED=number).

Rounds of one graph, three classifiers as an array, a segmenter behind each, all evaluations, on the two-node cluster of
slurm/dev_cluster: by `dvc repro`, which is started again whenever it ends, by `python -m pipeline drive` in every third
round. Faults come at random moments to random jobs. A round has to end with the weights and numbers of a graph to which
nothing happened, no job twice, no process left, and no more steps lost than docs/cluster.md promises. The seed gives
the order of faults, targets and pauses; what they meet depends on the machine.

It runs in namespaces of its own, so that a cluster which is up already is left alone and everything ends with it.
`FOLDER/faults.jsonl` has a line for each fault, and the last line of the output says how many of which kind.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from conftest import Checkout
from slurm_cluster import INTERVAL, PROFILE, STATE, SlurmCluster, dev_cluster, rank_processes
from soak_faults import FAULTS

INSIDE = "SOAK_INSIDE"
TARGETS = ("train_classifier", "train_segmenter", "evaluate_classifier", "evaluate_segmenter")
SEEDS = 3
LEFT_S = 900
"""After a graph, for its last jobs to end: Slurm takes minutes to miss a batch script whose slurmstepd was killed."""
STUCK_S = 2400
"""A round that shows nothing new for so long has failed."""
EXPECTED = (
    "was cancelled",
    "No space left",
    "disk is full",
    "free some space",
    "without getting beyond step",
    "blocked by",
    "Unable to acquire lock",
    "Unable to contact slurm",
    "is in use by job",
    "Slurm does not answer",
    "every checkpoint in",
    "exited with -9",
    "Already unlocked",
)
"""What `dvc repro` may end with."""
SETTINGS = (
    "scale=demo",
    f"seeds={[*range(SEEDS)]}".replace(" ", ""),
    "classification.train=[poolformer_s12]",
    "segmentation.train=[poolformer_s12]",
    "ablations.train=[]",
    "classification.recipe.max_steps=120",
    "classification.recipe.epochs=1000",
    "segmentation.recipe.max_steps=40",
)


class SoakError(Exception):
    """What does not hold."""


@dataclass(frozen=True)
class Row:
    """One running or pending job of squeue."""

    job: str
    raw: str
    state: str
    reason: str
    name: str
    token: str


@dataclass
class Round:
    """A checkout in which a graph runs, what starts it, and what has been done to it."""

    checkout: Checkout
    cluster: SlurmCluster
    draw: random.Random
    is_driven: bool
    log: Path
    launchers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    outputs: dict[int, Path] = field(default_factory=dict)
    """Of the launchers, by process id."""
    undo: list[tuple[float, Callable[[], object]]] = field(default_factory=list)
    """What ends a fault, and when (`time.monotonic`)."""
    counts: Counter[str] = field(default_factory=Counter)
    twice_since: dict[str, float] = field(default_factory=dict)
    cuts: int = 0

    # What is there

    def rows(self) -> list[Row]:
        """This graph's jobs that are pending or running; none while the controller is away."""
        command = ["squeue", "--noheader", "--array", "--user=root", "--format=%i|%A|%T|%r|%j|%k"]
        try:
            done = subprocess.run(command, env=self.cluster.environment, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            return []
        fields = (line.split("|") for line in done.stdout.splitlines())
        return [Row(*row) for row in fields if len(row) == 6 and row[5].startswith("metaformer-")]

    def running(self) -> list[Row]:
        return [row for row in self.rows() if row.state == "RUNNING"]

    def processes(self, row: Row | None = None) -> list[psutil.Process]:
        """The ranks of a job, or of all."""
        return [process for _, process in rank_processes(None if row is None else row.raw)]

    def steps(self) -> int:
        """Of all trainings together."""
        total = 0
        for path in self.checkout.folder.glob("runs/train_*/*/history.jsonl"):
            lines = path.read_text().splitlines()
            total += json.loads(lines[-1])["step"] if lines else 0
        return total

    # What runs it

    def start(self, *command: str) -> None:
        output = self.checkout.folder / f"output-{len(self.outputs):03d}.txt"
        with output.open("w") as stream:
            process = subprocess.Popen(
                command,
                cwd=self.checkout.folder,
                env=self.checkout.environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.launchers.append(process)
        self.outputs[process.pid] = output

    def repro(self) -> None:
        self.start("dvc", "repro", *TARGETS)

    def is_finished(self) -> bool:
        """Whether the graph has come to its end; starts again what has ended before."""
        if self.is_driven:
            if (self.checkout.folder / "runs/drive/repro/done").exists():
                return True
            if self.cluster.is_whole() and not any(row.name.startswith("drive-") for row in self.rows()):
                done = self.checkout.pipeline("drive", *TARGETS, check=False)
                self.note("drive", (done.stdout + done.stderr).strip()[-300:])
                if "Traceback" in done.stderr:
                    raise SoakError(done.stderr)
            return False
        for process in list(self.launchers):
            if process.poll() is None:
                continue
            self.launchers.remove(process)
            if process.returncode == 0:
                return True
            self.accept(process)
        if not self.launchers:
            self.repro()
        return False

    def accept(self, process: subprocess.Popen[bytes]) -> None:
        """A launcher ended before its time: that has to have a reason."""
        if process.returncode in (-signal.SIGKILL, -signal.SIGINT):
            return
        said = self.outputs[process.pid].read_text()
        self.note("launcher ended", " ".join(said.split())[-400:])
        if "Unable to acquire lock" in said and not self.launchers:  # a killed dvc's: what `doctor` says to do
            for name in ("lock", "rwlock.lock"):
                (self.checkout.folder / ".dvc/tmp" / name).unlink(missing_ok=True)
            self.note("dvc's lock removed", "")
        if "Traceback" in said or not any(words in said for words in EXPECTED):
            raise SoakError(f"dvc repro ended with {process.returncode}:\n{said[-3000:]}")

    def note(self, what: str, about: str) -> None:
        line = {"time": round(time.time(), 1), "round": self.checkout.folder.name, "what": what, "about": about}
        with self.log.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        print(time.strftime("%T"), self.checkout.folder.name, f"step {self.steps():4d}", what, "|", about, flush=True)

    def later(self, seconds: float, action: Callable[[], object]) -> None:
        self.undo.append((time.monotonic() + seconds, action))

    def tick(self) -> None:
        """Undo what is due, and look whether any run has two jobs."""
        for entry in [entry for entry in self.undo if time.monotonic() >= entry[0]]:
            self.undo.remove(entry)
            entry[1]()
        if not self.cluster.is_whole():
            return
        rows = self.rows()
        tokens = self.tokens()
        for row in rows:
            if "held" in row.reason.lower() and not self.undo:
                self.note("released", f"{row.job} {row.reason}")
                subprocess.run(["scontrol", "release", row.job], env=self.cluster.environment)
            key = f"{row.job} {row.token}"
            if row.token in tokens:
                self.twice_since.pop(key, None)
            elif time.monotonic() - self.twice_since.setdefault(key, time.monotonic()) > 180:
                raise SoakError(f"{row} belongs to no run folder, for three minutes")

    def tokens(self) -> set[str]:
        found = set()
        for path in self.checkout.folder.glob("runs/*/*/job.json"):
            try:
                found.add(json.loads(path.read_text())["token"])
            except (OSError, ValueError):
                continue
        return found

    # How it ended

    def losses(self) -> Iterator[tuple[str, int, int]]:
        """Run, steps lost, and the step from which it went on, of each attempt that went on."""
        for log in self.checkout.folder.glob("runs/train_*/*/jobs/*_0_log.out"):
            yield from _losses(log.parent.parent.name, log.read_text(errors="replace"))
        for log in self.checkout.folder.glob("runs/arrays/*/*_0_log.out"):
            yield from _losses(log.stem, log.read_text(errors="replace"))

    def assert_whole(self, expected: dict[str, str]) -> None:
        deadline = time.monotonic() + LEFT_S
        while self.rows() or self.processes():
            if time.monotonic() > deadline:
                raise SoakError(f"left: {self.rows()} {self.processes()}")
            time.sleep(1)
        if (found := digests(self.checkout.folder)) != expected:
            differing = [name for name in expected if found.get(name) != expected[name]]
            raise SoakError(f"not what an undisturbed graph gives: {differing}")
        lost = list(self.losses())
        most = max((steps for _, steps, _ in lost), default=0)
        if most > INTERVAL * (1 + self.cuts):
            raise SoakError(f"{most} steps lost: {lost}")
        self.note(
            "whole", f"{len(lost)} times gone on, {sum(steps for _, steps, _ in lost)} steps lost, at most {most}"
        )


def _losses(name: str, text: str) -> Iterator[tuple[str, int, int]]:
    parts = re.split(r"going on from step (\d+) of", text)
    for before, resumed in zip(parts[::2], parts[1::2], strict=False):
        reached = re.findall(r" step (\d+)/", before)
        if reached:
            yield name, max(0, int(reached[-1]) - int(resumed)), int(resumed)


def digests(folder: Path) -> dict[str, str]:
    """Of what the graph makes, without times."""
    found = {}
    files = [*folder.glob("models/**/*.pt"), *folder.glob("results/evaluate_*/*.json")]
    if len(files) != len(TARGETS) * SEEDS:
        raise SoakError(f"{len(files)} files of {len(TARGETS)} stages and {SEEDS} seeds: {files}")
    for path in sorted(files):
        content = path.read_bytes()
        if path.suffix == ".json":
            content = json.dumps({k: v for k, v in json.loads(content).items() if not k.endswith("_per_s")}).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()[:16]
    return found


def disturb(round_: Round, pause_s: float) -> None:
    """Faults, with a pause of `pause_s` between two on average, until the graph has come to its end."""
    names, weights = list(FAULTS), [weight for _, weight in FAULTS.values()]
    next_s = time.monotonic() + 20
    seen, seen_at = (-1, 0), time.monotonic()
    while not round_.is_finished():
        round_.tick()
        now = (round_.steps(), len(list(round_.checkout.folder.glob("runs/*/*/done"))))
        if now != seen:
            seen, seen_at = now, time.monotonic()
        if time.monotonic() - seen_at > STUCK_S:
            raise SoakError(f"nothing new for {STUCK_S} s: {round_.rows()}")
        if time.monotonic() >= next_s:
            name = round_.draw.choices(names, weights)[0]
            try:
                about = FAULTS[name][0](round_)
            except (AssertionError, subprocess.SubprocessError, psutil.Error, OSError) as error:
                about = None  # the job has ended, or the controller is away
                print("   not done:", name, " ".join(str(error).split())[:200], flush=True)
            if about is not None:
                round_.counts[name] += 1
                round_.note(name, about)
                next_s = time.monotonic() + round_.draw.expovariate(1 / pause_s)
            else:
                next_s = time.monotonic() + 1
        time.sleep(0.5)
    for _, action in round_.undo:
        action()
    round_.undo.clear()
    round_.cluster.up()
    for process in round_.launchers:  # another dvc repro: it has to come to its end as well
        process.wait(timeout=600)


def prepared(folder: Path, cluster: SlurmCluster) -> Checkout:
    """A checkout with its data, made once."""
    checkout = Checkout.at(folder) if folder.exists() else Checkout(folder)
    _environment(checkout, cluster)
    (folder / "slurm/soak.yaml").write_text(PROFILE + "stall_min: 2\n")
    checkout.pipeline("compose", *SETTINGS)
    checkout.run("dvc", "repro", "convert_imagenet", "convert_ade20k")
    return checkout


def _environment(checkout: Checkout, cluster: SlurmCluster) -> None:
    checkout.environment |= {"PIPELINE_CLUSTER": "slurm/soak.yaml", "SLURM_CONF": cluster.environment["SLURM_CONF"]}


def copy_of(source: Checkout, folder: Path, cluster: SlurmCluster) -> Checkout:
    shutil.copytree(source.folder, folder, symlinks=True)
    checkout = Checkout.at(folder)
    _environment(checkout, cluster)
    runs = folder / "runs"
    runs.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5g", "soak", runs], check=True)
    return checkout


def soak(folder: Path, seconds: float, seed: int, pause_s: float, drive_every: int) -> int:
    """Rounds until the time is over; the exit status."""
    started = dev_cluster("up")
    if started.returncode:
        print(started.stderr)
        return 1
    cluster = SlurmCluster(is_borrowed=False)
    cluster.run("sacctmgr", "--immediate", "add", "user", "daemon", "account=root")
    folder.mkdir(parents=True, exist_ok=True)
    base = prepared(folder / "base", cluster)
    reference = folder / "undisturbed.json"
    if not reference.exists():
        print("== the undisturbed graph", flush=True)
        began = time.monotonic()
        undisturbed = copy_of(base, folder / "undisturbed", cluster)
        undisturbed.run("dvc", "repro", *TARGETS)
        reference.write_text(json.dumps(digests(undisturbed.folder), indent=1))
        print(f"   {time.monotonic() - began:.0f} s", flush=True)
    expected = json.loads(reference.read_text())
    totals: Counter[str] = Counter()
    deadline, number = time.monotonic() + seconds, 0
    while time.monotonic() < deadline:
        place = folder / f"round-{seed}-{number:02d}"
        shutil.rmtree(place, ignore_errors=True)
        checkout = copy_of(base, place, cluster)
        draw = random.Random(f"{seed} {number}")
        round_ = Round(checkout, cluster, draw, number % drive_every == drive_every - 1, folder / "faults.jsonl")
        began = time.monotonic()
        try:
            disturb(round_, pause_s)
            round_.assert_whole(expected)
        except (SoakError, AssertionError, subprocess.SubprocessError) as error:
            print(f"FAILED in {place}: {error}", flush=True)
            subprocess.run(["cp", "-a", place / "runs", place / "runs-kept"])
            return 1
        totals += round_.counts
        steps = sum(lost for _, lost, _ in round_.losses())
        faults = (
            f"{sum(round_.counts.values())} faults, {steps} steps lost; so far {sum(totals.values())}: {dict(totals)}"
        )
        print(f"== round {number} of seed {seed}: {time.monotonic() - began:.0f} s, {faults}", flush=True)
        subprocess.run(["umount", "--lazy", place / "runs"])
        shutil.rmtree(place, ignore_errors=True)
        number += 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--pause-s", type=float, default=20, help="between two faults, on average (default: %(default)s)"
    )
    parser.add_argument(
        "--drive-every", type=int, default=3, help="of so many rounds one by a drive (default: %(default)s)"
    )
    parser.add_argument("--folder", type=Path, default=Path("/tmp/soak"))
    options = parser.parse_args()
    if os.geteuid() != 0:
        print("the cluster needs root: sudo make soak")
        return 1
    if INSIDE not in os.environ:
        private = ["unshare", "--mount", "--net", "--pid", "--ipc", "--fork", "--mount-proc", "--kill-child"]
        return subprocess.run([*private, sys.executable, *sys.argv], env=os.environ | {INSIDE: "1"}).returncode
    hosts = Path("/etc/hosts").read_text() + f"127.0.0.1 {os.uname().nodename}\n"  # there is no DNS in here
    subprocess.run(["mount", "-t", "tmpfs", "soak", STATE.parent], check=True)
    (STATE.parent / "hosts").write_text(hosts)
    subprocess.run(["mount", "--bind", STATE.parent / "hosts", "/etc/hosts"], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    # glibc looks up no name for Slurm where there is no address but 127.0.0.1 (AI_ADDRCONFIG).
    subprocess.run(["ip", "address", "add", "192.0.2.1/32", "dev", "lo"], check=True)
    return soak(options.folder.absolute(), options.seconds, options.seed, options.pause_s, options.drive_every)


if __name__ == "__main__":
    sys.exit(main())
