"""What a job's result depends on, as one hash: the call, its arguments, the code, and the data."""

import functools
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import UserError


@dataclass(frozen=True)
class Work:
    """One call of `tasks` that runs as a job.

    `call` is 'module:function'; the function takes (world, run_folder, profile) and `arguments`, which JSON can hold.
    `code` are files and packages, `inputs` files, whose contents the result depends on: the stage's DVC dependencies,
    with a manifest in place of each .beton. `after` is another work that this one starts from. `watching` are further
    arguments, for what is looked at while the job runs: they change no result, and are no part of the fingerprint.
    """

    stage: str
    name: str
    call: str
    arguments: dict[str, Any]
    code: tuple[str, ...]
    inputs: tuple[Path, ...] = field(default=())
    after: "Upstream | None" = None
    watching: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Upstream:
    """A file of another work's `out/`, passed on as one argument.

    That work's fingerprint stands for the file, so that a job can be queued behind one that has not run yet. `place`
    is where DVC has the file: it is read there when this checkout has no run of that fingerprint (after `dvc pull`).
    """

    work: Work
    output: str
    place: Path
    argument: str


def fingerprint(work: Work) -> str:
    """SHA-256 over everything that `work`'s result depends on.

    Raises:
        UserError: an input is missing.
    """
    digest = hashlib.sha256(json.dumps([work.call, work.arguments], sort_keys=True).encode())
    for path in _files(work.code):
        digest.update(str(path).encode() + path.read_bytes())
    for path in work.inputs:
        if not path.exists():
            raise UserError(f"{work.stage} needs {path}, which is missing: run `dvc repro` to make it")
        there = path.stat()
        digest.update(str(path).encode() + _contents(path, there.st_mtime_ns, there.st_size))
    if work.after is not None:
        digest.update(f"{work.after.argument} {work.after.output} {fingerprint(work.after.work)}".encode())
    return digest.hexdigest()


@functools.cache
def _contents(path: Path, mtime_ns: int, size_bytes: int) -> bytes:
    """SHA-256 of a file, once for each of its versions: ImageNet's manifest is some 100 MB."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _files(code: Iterable[str]) -> list[Path]:
    found: set[Path] = set()
    for entry in map(Path, code):
        if not entry.exists():
            raise FileNotFoundError(f"code dependency {entry}")
        found |= {entry} if entry.is_file() else {p for p in entry.rglob("*") if p.suffix in {".py", ".c", ".h"}}
    return sorted(found)
