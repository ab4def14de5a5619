"""Copies of .betons on a node's own disk, where the cluster profile's `local_copy` names a folder.

A copy is made once per node and shared by all ranks and jobs there: the first to need it copies, the others wait. It is
kept while a job that uses it will come back, and removed by the last one that has finished. Where a copy cannot be
made, the job reads the original, with a warning.
"""

import fcntl
import filecmp
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pipeline import paths
from pipeline.launch.fingerprint import content_digest

log = logging.getLogger(__name__)
CHUNK_BYTES = 16 * 2**20
PROGRESS_S = 30.0
SPARE = 0.05
"""The share of the disk that a copy leaves free."""


class LocalCopies(AbstractContextManager["LocalCopies"]):
    """The copies that one rank uses. Leaving the block gives them up, and removes those that nobody needs any more."""

    def __init__(self, betons: Sequence[Path], folder: str | None, should_stop: Callable[[], bool]) -> None:
        """`folder` may name environment variables of the node, as `$SLURM_TMPDIR`; None: no copies."""
        self.betons, self.folder, self.should_stop = betons, folder, should_stop
        self.places: dict[str, str] = {}
        """From each original's absolute path to its copy's."""
        self.finished = False
        """Set by the caller when no attempt of this job will follow."""
        self.held: list[tuple[int, Path]] = []

    def __enter__(self) -> "LocalCopies":
        if self.folder is not None:
            for beton in self.betons:
                try:
                    self.places[str(beton.absolute())] = str(self._copy(beton))
                except OSError as error:
                    log.warning("no local copy of %s (%s): reading it from where it is", beton, error)
        return self

    def __exit__(self, *_: object) -> None:
        for lock, place in self.held:
            if self.finished and _locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                log.info("removing %s", place)
                shutil.rmtree(place, ignore_errors=True)
            os.close(lock)

    def localised(self, value: Any) -> Any:
        """A call's arguments with each original's path replaced by its copy's."""
        if isinstance(value, dict):
            return {name: self.localised(part) for name, part in value.items()}
        return self.places.get(str(Path(value).absolute()), value) if isinstance(value, str) else value

    def _copy(self, beton: Path) -> Path:
        """The copy's path, whole; this rank holds a shared lock on it until the block ends.

        Raises:
            OSError: it cannot be made here.
        """
        disk = Path(os.path.expandvars(str(self.folder))).expanduser()
        if "$" in str(disk):
            raise OSError(f"local_copy: {self.folder} names a variable that is not set on this node")
        manifest = paths.manifest(beton)
        key = content_digest(manifest)[:16]
        place = disk / f"{os.environ.get('USER', os.getuid())}-betons" / f"{beton.stem}-{key}"
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        target, size = place / beton.name, beton.stat().st_size
        lock = os.open(place.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            while True:
                _wait(lock, fcntl.LOCK_SH, target)
                if _is_whole(target, size, manifest):
                    self.held.append((lock, place))
                    return target
                _wait(lock, fcntl.LOCK_EX, target)
                if not _is_whole(target, size, manifest):
                    self._make(beton, target, size)
        except BaseException:
            os.close(lock)
            raise

    def _make(self, beton: Path, target: Path, size: int) -> None:
        shutil.rmtree(target.parent, ignore_errors=True)
        target.parent.mkdir(mode=0o700)
        usage = shutil.disk_usage(target.parent)
        if usage.free - size < SPARE * usage.total:
            raise OSError(f"{usage.free / 1e9:.1f} GB free in {target.parent}, {size / 1e9:.1f} GB needed")
        started = said = time.monotonic()
        log.info("copying %s (%.1f GB) to %s", beton, size / 1e9, target)
        try:
            with beton.open("rb", buffering=0) as source, target.open("wb", buffering=0) as copy:
                while chunk := source.read(CHUNK_BYTES):
                    if self.should_stop():
                        raise OSError("the job has to stop")
                    copy.write(chunk)
                    if time.monotonic() - said > PROGRESS_S:
                        said = time.monotonic()
                        done, rate = copy.tell(), copy.tell() / (said - started)
                        text = "copied %.1f of %.1f GB, %.2f GB/s, %.0f s left"
                        log.info(text, done / 1e9, size / 1e9, rate / 1e9, (size - done) / rate)
                if copy.tell() != size:
                    raise OSError(f"{beton} has changed while it was copied")
            shutil.copyfile(paths.manifest(beton), paths.manifest(target))
        except BaseException:
            shutil.rmtree(target.parent, ignore_errors=True)
            raise
        seconds = time.monotonic() - started
        log.info("copied %.1f GB in %.0f s (%.2f GB/s)", size / 1e9, seconds, size / 1e9 / max(seconds, 1e-9))


def _is_whole(target: Path, size: int, manifest: Path) -> bool:
    """The manifest comes last, so that a copy which has it is whole."""
    copied = paths.manifest(target)
    return (
        target.exists()
        and target.stat().st_size == size
        and copied.exists()
        and filecmp.cmp(copied, manifest, shallow=False)
    )


def _wait(lock: int, kind: int, target: Path) -> None:
    """Take the lock; where that takes long, say what is waited for."""
    started = said = time.monotonic()
    while not _locked(lock, kind | fcntl.LOCK_NB):
        if time.monotonic() - said > PROGRESS_S:
            said = time.monotonic()
            log.info("waiting for another process to copy %s, %.0f s so far", target, said - started)
        time.sleep(0.1)


def _locked(lock: int, kind: int) -> bool:
    try:
        fcntl.flock(lock, kind)
    except BlockingIOError:
        return False
    return True
