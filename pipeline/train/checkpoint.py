"""Checkpoints that are whole or not there: written beside, synced, renamed, and read back with a checksum.

The two newest are kept, so that one which a disk has damaged costs one interval and not the run.
"""

import hashlib
import logging
import re
from pathlib import Path
from typing import Any

import torch

from pipeline import paths

KEEP = 2
_NAME = re.compile(r"step-(\d+)\.pt$")
log = logging.getLogger(__name__)


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` as the checkpoint of `step`; older ones beyond the newest two are deleted.

    Raises:
        OSError: the disk is full or not writable; the checkpoints that are there stay untouched.
    """
    target = folder / f"step-{step}.pt"
    write(target, {"step": step, **state})
    digest = _sha256(target)
    with paths.written_atomically(_digest_file(target)) as temporary:
        temporary.write_text(digest)
    for old in _newest_first(folder)[KEEP:]:
        old.unlink(missing_ok=True)
        _digest_file(old).unlink(missing_ok=True)
    return target


def write(target: Path, content: dict[str, Any]) -> None:
    """Write tensors whole or not at all; the same ones give the same bytes, whatever the file is called.

    Raises:
        OSError: the disk is full or not writable.
    """
    with paths.written_atomically(target) as temporary, temporary.open("wb") as stream:
        try:
            torch.save(content, stream)
        except RuntimeError as error:  # torch's own, in place of what the file said
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, on the CPU, or None; damaged ones are named in the log and passed over."""
    for path in _newest_first(folder):
        digest = _digest_file(path)
        if not digest.exists() or digest.read_text() != _sha256(path):
            log.warning("%s is damaged or half-written; going on from the one before", path)
            continue
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state
    return None


def _newest_first(folder: Path) -> list[Path]:
    found = [(int(match[1]), path) for path in folder.glob("step-*.pt") if (match := _NAME.search(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _digest_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
