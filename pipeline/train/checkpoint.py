"""Checkpoints that are whole or not there: hashed while they are written, synced, and named by step and hash.

A file has its name only when all of it is on the disk. The two newest that are whole are kept, so that one which a disk
has damaged costs one interval and not the run.
"""

import hashlib
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch

from pipeline import paths
from pipeline.errors import UserError

KEEP = 2
_NAME = re.compile(r"step-(\d+)-([0-9a-f]{16})\.pt")
log = logging.getLogger(__name__)


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` as the checkpoint of `step`; of the older ones the newest whole one is kept.

    Raises:
        OSError: the disk is full or not writable; the checkpoints that are there stay untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".step-{step}.{os.getpid()}"
    try:
        with temporary.open("wb") as stream:
            hashing = _Hashing(stream)
            _save({"step": step, **state}, hashing)
            stream.flush()
            os.fsync(stream.fileno())
        target = folder / f"step-{step}-{hashing.digest.hexdigest()[:16]}.pt"
        temporary.replace(target)
        paths.sync_directory(folder)
    finally:
        temporary.unlink(missing_ok=True)
    whole = 1
    for old in _newest_first(folder):
        if old != target and whole < KEEP and _is_whole(old):
            whole += 1
        elif old != target and whole == KEEP:
            old.unlink(missing_ok=True)
    return target


class _Hashing:
    """A stream that hashes what is written to it."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.digest = stream, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return int(self.stream.write(data))

    def flush(self) -> None:
        self.stream.flush()


def write(target: Path, content: dict[str, Any]) -> None:
    """Write tensors whole or not at all; the same ones give the same bytes, whatever the file is called.

    Raises:
        OSError: the disk is full or not writable.
    """
    with paths.written_atomically(target) as temporary, temporary.open("wb") as stream:
        _save(content, stream)


def _save(content: dict[str, Any], stream: Any) -> None:
    try:
        torch.save(content, stream)
    except RuntimeError as error:  # torch's own, in place of what the file said
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, on the CPU, or None where there has been none; damaged ones are named.

    Raises:
        UserError: there are checkpoints, and none is whole: a start at step 0 would throw their steps away.
    """
    found = _newest_first(folder)
    for path in found:
        if _is_whole(path):
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return state
        log.warning("%s is damaged; going on from the one before", path)
    if found:
        raise UserError(f"every checkpoint in {folder} is damaged: bring one back, or delete them to start at step 0")
    return None


def remove_unfinished(folder: Path) -> None:
    """Delete what killed processes left of checkpoints that they were writing."""
    for path in folder.glob(".step-*"):
        path.unlink(missing_ok=True)


def _newest_first(folder: Path) -> list[Path]:
    found = [(int(match[1]), path) for path in folder.glob("step-*.pt") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _is_whole(path: Path) -> bool:
    match = _NAME.fullmatch(path.name)
    with path.open("rb") as stream:
        return match is not None and hashlib.file_digest(stream, "sha256").hexdigest().startswith(match[2])
