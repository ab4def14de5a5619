"""The files of a training's run folder as MLflow's metrics."""

import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.train import history

NOT_METRICS = {"step", "total_steps", "time_ms", "seconds", "seconds_left"}
BY_EPOCH = ("loss", "learning_rate", "images_per_s")
COST = ("images_per_s", "peak_memory_gb", "rank_hours", "gpu_hours", "energy_kwh")


class RunFiles:
    """What one run folder has to tell, with its times as they are written there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: tuple[int, list[dict[str, Any]]] = (0, [])

    def records(self) -> list[dict[str, Any]]:
        """The history, read again when it has changed."""
        file = self.folder / "history.jsonl"
        seen = file.stat().st_mtime_ns if file.exists() else 0
        if self.seen[0] != seen:
            self.seen = (seen, history.read(file))
        return self.seen[1]

    def steps(self, *, after: int) -> list[Any]:
        """The history's curves behind a step."""
        from mlflow.entities import Metric

        return [
            Metric(key, float(value), int(record.get("time_ms", 0)), record["step"])
            for record in self.records()
            if record["step"] > after
            for key, value in record.items()
            if key not in NOT_METRICS and isinstance(value, int | float)
        ]

    def validation_passes(self) -> list[dict[str, Any]]:
        """The validation passes of a training."""
        return history.read(self.folder / "validation.jsonl")

    def validations(self) -> list[Any]:
        """Those accuracies against steps."""
        from mlflow.entities import Metric

        return [
            Metric(key, float(value), record["time_ms"], record["step"])
            for record in self.validation_passes()
            for key, value in record.items()
            if key not in ("step", "epoch", "time_ms")
        ]

    def samples(self) -> list[Any]:
        """What the sampler wrote of processor, memory and GPU, under MLflow's own names."""
        from mlflow.entities import Metric

        return [
            Metric(f"system/{key}", float(value), int(record["time_ms"]), record["step"])
            for record in history.read(self.folder / "system.jsonl")
            for key, value in record.items()
            if key not in ("step", "time_ms")
        ]

    def final(self) -> list[Any]:
        """Curves by epoch, cost, and the evaluation: what is known at the end."""
        from mlflow.entities import Metric

        records = self.records()
        metrics = list(_epochs(records))
        metrics += [
            Metric("epoch/top1", float(record["top1"]), record["time_ms"], round(record["epoch"]))
            for record in self.validation_passes()
        ]
        last = records[-1]["step"] if records else 0
        cost, evaluation = self.folder / "out/cost.json", self.folder / "evaluation.json"
        if cost.exists():
            metrics += [
                Metric(f"cost/{key}", float(value), _modified_ms(cost), last)
                for key, value in json.loads(cost.read_text()).items()
                if key in COST and value is not None
            ]
        if evaluation.exists():
            measured = json.loads(evaluation.read_text())
            at = _modified_ms(evaluation)
            # Beside the training's curve of that name.
            values = {"val_loss" if key == "loss" else key: value for key, value in measured.items()}
            metrics += [Metric(key, float(value), at, last) for key, value in values.items() if value is not None]
            if records and "top1" in values:
                metrics.append(Metric("epoch/top1", float(values["top1"]), at, round(records[-1]["epoch"])))
        return metrics

    def ended_ms(self) -> int:
        """When the run ended, Unix time."""
        if (self.folder / "done").exists():
            return _modified_ms(self.folder / "done")
        files = [*self.folder.glob("errors/*.json"), *self.folder.glob("history.jsonl")]
        return max(map(_modified_ms, files), default=round(time.time() * 1000))

    def stamp(self) -> list[int]:
        """Changes when a file that is mirrored does."""
        names = ("about.json", "job.json", "history.jsonl", "validation.jsonl", "system.jsonl")
        files = [self.folder / name for name in (*names, "out/cost.json", "evaluation.json")]
        return [file.stat().st_mtime_ns if file.exists() else 0 for file in files]


def _epochs(records: list[dict[str, Any]]) -> Iterator[Any]:
    """Means over the records of each whole epoch, against the epoch's number."""
    from mlflow.entities import Metric

    for epoch, group in itertools.groupby(records, lambda record: math.ceil(record["epoch"])):
        inside = list(group)
        if epoch > records[-1]["epoch"]:
            return
        for key in [key for key in BY_EPOCH if key in inside[-1]]:
            mean = sum(record[key] for record in inside) / len(inside)
            yield Metric(f"epoch/{key}", mean, int(inside[-1].get("time_ms", 0)), epoch)


def _modified_ms(file: Path) -> int:
    return file.stat().st_mtime_ns // 1_000_000
