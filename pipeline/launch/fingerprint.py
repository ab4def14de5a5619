"""What a job's result depends on, as one hash: the call, its arguments, the code, and the data."""

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
    with a manifest in place of each .beton.
    """

    stage: str
    name: str
    call: str
    arguments: dict[str, Any]
    code: tuple[str, ...]
    inputs: tuple[Path, ...] = field(default=())


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
        with path.open("rb") as stream:
            digest.update(str(path).encode() + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _files(code: Iterable[str]) -> list[Path]:
    found: set[Path] = set()
    for entry in map(Path, code):
        if not entry.exists():
            raise FileNotFoundError(f"code dependency {entry}")
        found |= {entry} if entry.is_file() else {p for p in entry.rglob("*") if p.suffix in {".py", ".c", ".h"}}
    return sorted(found)
