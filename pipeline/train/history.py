"""The record of a run as JSON lines: one per logging interval, appended by rank 0, truncated when a run resumes."""

import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from pipeline import paths

# What a rerun on the same layout repeats exactly; the other fields are the clock's.
CURVE_COLUMNS = ["step", "epoch", "loss", "learning_rate"]
VALIDATION_COLUMNS = ["step", "epoch", "top1", "top5", "val_loss"]


def append(path: Path, record: dict[str, Any]) -> None:
    """Add one line, flushed, so that whoever watches the run sees it; what a full disk cut short stays its own line."""
    with path.open("ab+") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            cut_short = stream.read(1) != b"\n"
            stream.write(b"\n" * cut_short)
        stream.write(json.dumps(record).encode() + b"\n")


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines; one that a killed writer left unfinished is skipped."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def truncate_after(path: Path, step: int) -> None:
    """Drop what was logged after `step`: the run goes on from there and will log it again."""
    kept = [record for record in read(path) if record["step"] <= step]
    with paths.written_atomically(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))


def write_curve(records: list[dict[str, Any]], curve: Path) -> None:
    """Write the repeatable columns of a history as CSV."""
    _write(records, CURVE_COLUMNS, curve)


def write_validation(records: list[dict[str, Any]], file: Path) -> None:
    """Write the validation passes of a training as CSV."""
    _write(records, VALIDATION_COLUMNS, file)


def _write(records: list[dict[str, Any]], columns: list[str], file: Path) -> None:
    import pandas as pd

    with paths.written_atomically(file) as temporary:
        pd.DataFrame(records, columns=columns).to_csv(temporary, index=False)


def progress_line(record: dict[str, Any]) -> str:
    """One record for a person."""
    line = (
        f"step {record['step']}/{record['total_steps']}  epoch {record['epoch']:.2f}  loss {record['loss']:.4f}  "
        f"{record['images_per_s']:.1f} images/s  {timedelta(seconds=round(record['seconds_left']))} left"
    )
    if record["data_wait"] > 0.05:
        line += f"  (data is the bottleneck: waiting for it {record['data_wait']:.0%} of the time)"
    return line
