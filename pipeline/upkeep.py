"""The upkeep of results: `why` one would be made again, `adopt` it after a harmless change, `clean` what none needs."""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline import paths
from pipeline.config import Params
from pipeline.errors import UserError
from pipeline.launch import record
from pipeline.launch.fingerprint import Identity, Work
from pipeline.launch.submission import Run, attach, find_run
from pipeline.launch.works import of_stage
from pipeline.tracking.about import flat


def why(params: Params, stage: str, variant: str, seed: int) -> str:
    """What differs between the run that is there and the one that would be made now, a line each."""
    run = Run.of(_work(params, stage, variant, seed))
    there = record.read_identity(run.folder)
    if there is None:
        return f"{run.folder} holds no run yet"
    state = "is done" if (run.folder / "done").exists() else f"has reached step {record.newest_step(run.folder)}"
    lines = differences(there, run.identity)
    if not lines:
        lines = [f"the run in {run.folder} {state}, and nothing that its result depends on has changed"]
    else:
        lines.insert(0, f"the run in {run.folder} {state}; one made now would differ in")
        if (earlier := find_run(run)) is not None:
            lines.append(f"exactly that run was put aside: `dvc repro` brings {earlier} back")
    for adoption in record.adoptions(run.folder):
        lines.append(f"adopted on {time.strftime('%Y-%m-%d', time.gmtime(adoption['time']))}: {adoption['because']}")
    return "\n".join([*lines, *_other_software(run.folder)])


def differences(before: Identity, now: Identity) -> list[str]:
    """Arguments by name, data by file, code by definition."""
    lines = []
    old, new = flat(before.arguments), flat(now.arguments)
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            lines.append(f"  parameter {name}: {old.get(name, 'not there')} -> {new.get(name, 'not there')}")
    for path in sorted(before.inputs.keys() | now.inputs.keys()):
        if before.inputs.get(path) != now.inputs.get(path):
            lines.append(f"  data {path}: {_short(before.inputs.get(path))} -> {_short(now.inputs.get(path))}")
    if before.after != now.after:
        lines.append(f"  the run that it starts from: {_short(before.after)} -> {_short(now.after)}")
    if before.code != now.code:
        lines += [f"  code: {line}" for line in _code_differences(before.definitions, now.definitions)]
    return lines


def _code_differences(before: dict[str, str], now: dict[str, str]) -> Iterator[str]:
    """By name: a definition that only moved to another module is the same."""
    old, new = ({(place.rpartition(":")[2], digest): place for place, digest in each.items()} for each in (before, now))
    gone = {name: place for (name, digest), place in old.items() if (name, digest) not in new}
    come = {name: place for (name, digest), place in new.items() if (name, digest) not in old}
    for name in sorted(gone.keys() | come.keys()):
        word = "changed" if name in gone and name in come else "no longer used" if name in gone else "now used"
        yield f"{come.get(name) or gone[name]} {word}"


def _other_software(folder: Path) -> Iterator[str]:
    attempts = record.software(folder)
    for name, ran in sorted(attempts[-1].items()) if attempts else ():
        try:
            here = version(name)
        except PackageNotFoundError:  # not a package: Python itself, a compiled library
            continue
        if here != ran:
            yield f"its last attempt ran {name} {ran}; {here} is installed now, which makes nothing stale"


def adopt(params: Params, stage: str, variant: str, seed: int, because: str) -> str:
    """State that a run is also the result of the code, data and parameters that are here now.

    What it was before, and why, stays in the run folder and in the report.

    Raises:
        UserError: there is no run, nothing differs, no reason is given, or a job of the run is alive.
    """
    if not because.strip():
        raise UserError('say why the result is the same: --because "..."')
    run = Run.of(_work(params, stage, variant, seed))
    with record.launching():
        there = record.read_identity(run.folder)
        if there is None:
            raise UserError(f"{run.folder} holds no run that could be adopted")
        lines = differences(there, run.identity)
        if not lines:
            raise UserError(f"{run.folder} is up to date: there is nothing to adopt")
        if (job := attach(run.folder)) is not None:
            raise UserError(f"job {job.job_id} of {run.folder} waits or runs: wait for it, or cancel it")
        entry = {"time": time.time(), "because": because, "from": there.fingerprint, "to": run.fingerprint}
        for file, more in (
            (run.folder / "adopted.jsonl", {"differences": lines}),
            # Among the results too, so that the report is made anew.
            (paths.RESULTS / "adopted.jsonl", {"stage": stage, "name": run.work.name}),
        ):
            file.parent.mkdir(exist_ok=True)
            with file.open("a") as stream:
                stream.write(json.dumps({**entry, **more}) + "\n")
        if record.is_done(run.folder, there.fingerprint):
            # Before the fingerprint: a run that is done must not look unfinished to whoever comes between.
            with paths.written_atomically(run.folder / "done") as temporary:
                temporary.write_text(run.fingerprint)
        record.write_identity(run.folder, run.identity)
    return "\n".join([f"adopted {run.folder}: `dvc repro` takes it as it is, though it differs in", *lines])


@dataclass(frozen=True)
class Leftover:
    """A folder that no result needs."""

    folder: Path
    what: str
    size_bytes: int


def leftovers() -> list[Leftover]:
    """Runs put aside, copies of code that no run folder in its place names; nothing that a job uses."""
    found, needed = [], set[str]()
    for work in sorted(paths.RUNS.glob("*/*/work.json")):
        folder = work.parent
        alive = attach(folder) is not None
        if not paths.is_put_aside(folder) or alive:
            needed.add(str(record.read_work(folder).get("snapshot")))
    for identity in sorted(paths.RUNS.glob("*/*.*/identity.json")):
        folder = identity.parent
        if attach(folder) is not None:
            continue
        step = record.newest_step(folder)
        state = "done" if (folder / "done").exists() else f"checkpoint of step {step}" if step else "no checkpoint"
        found.append(Leftover(folder, f"put aside, {state}", _size_bytes(folder)))
    for folder in sorted((paths.RUNS / "code").glob("[!.]*")):
        if str(folder.absolute()) not in needed:
            found.append(Leftover(folder, "copy of code", _size_bytes(folder)))
    return found


def clean(*, yes: bool) -> int:
    """List what could be deleted, ask, delete; the exit status."""
    with record.launching():
        found = leftovers()
        for each in found:
            print(f"{each.size_bytes / 1e6:10.1f} MB  {each.folder}  ({each.what})")
        if not found:
            print("nothing to delete: no run is put aside, and every copy of code is in use")
            return 0
        print(f"{sum(each.size_bytes for each in found) / 1e6:10.1f} MB in all")
        if not yes and input("Delete these? Their checkpoints cannot be brought back. [y/N] ").strip().lower() != "y":
            print("nothing was deleted")
            return 1
        for each in found:
            shutil.rmtree(each.folder)
    return 0


def _work(params: Params, stage: str, variant: str, seed: int) -> Work:
    work = of_stage(params, stage, variant, seed)
    if work is None:
        raise UserError(f"{stage} takes released weights with these parameters: there is no run")
    return work


def _size_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "none"
