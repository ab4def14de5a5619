"""Run folders to mirror, and an MLflow server on PostgreSQL, both on loopback and gone with the test."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conftest import skip

from pipeline.paper import label
from pipeline.tracking.about import About, provenance


def run_folder(
    variant: str = "poolformer_s12", seed: int = 0, kind: str = "classifier", scale: str = "demo", steps: int = 0
) -> Path:
    """A training's run folder beneath the working directory, as its stage writes it."""
    folder = Path("runs") / f"train_{kind}" / f"{variant}-{seed}"
    folder.mkdir(parents=True)
    tags = {"kind": kind, "model": label(variant), "variant": variant, "seed": str(seed)}
    data = {"name": "imagenet training", "digest": "ab" * 18, "source_type": "local", "source": "{}"}
    About(
        kind,
        scale,
        f"{label(variant)} · seed {seed}",
        {"scale": scale, "recipe.epochs": "5"},
        tags | provenance(f"dvc repro train_{kind}@{variant}-{seed}"),
        [{**data, "profile": '{"num_rows": 9}', "context": "training"}],
    ).write(folder)
    (folder / "fingerprint").write_text(f"{variant}{seed}{kind}")
    train(folder, 0, steps)
    return folder


def train(folder: Path, first: int, last: int, *, at_ms: int = 1_700_000_000_000) -> None:
    """Add the history of steps after `first` up to `last`; ten steps per epoch."""
    with (folder / "history.jsonl").open("a") as stream:
        for step in range(first + 1, last + 1):
            record = {
                "step": step, "total_steps": 1000, "epoch": step / 10, "loss": 7 / step, "learning_rate": 0.001,
                "images_per_s": 100.0, "data_wait": 0.01, "seconds_left": 1.0, "peak_memory_gb": 1.5,
                "seconds": step, "time_ms": at_ms + 1000 * step,
            }  # fmt: skip
            stream.write(json.dumps(record) + "\n")


def finish(folder: Path, **measured: float) -> None:
    """The training is done and evaluated."""
    (folder / "done").write_text("mark")
    (folder / "out").mkdir(exist_ok=True)
    cost = {"device": "CPU", "ranks": 1, "images_per_s": 99.0, "peak_memory_gb": 1.5, "gpu_hours": 0.0}
    (folder / "out/cost.json").write_text(json.dumps({**cost, "rank_hours": 0.1, "energy_kwh": None}))
    (folder / "evaluation.json").write_text(json.dumps(measured))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def needs_postgresql() -> Path:
    """Folder of PostgreSQL's programs; skips without them or without root, in CI fails."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    reason = "" if found else "no PostgreSQL: as root, apt-get install postgresql"
    if os.getuid() != 0:
        reason = "only root may start PostgreSQL as its own user"
    if reason:
        skip(reason)
    return found[-1].parent


@contextmanager
def postgresql() -> Iterator[str]:
    """A database of its own; gives its address for SQLAlchemy."""
    programs = needs_postgresql()
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    shutil.chown(folder, "postgres", "postgres")
    port = free_port()

    def as_postgres(*command: str) -> None:
        done = subprocess.run(
            ["runuser", "-u", "postgres", "--", *command], cwd=folder, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"

    data, control = str(folder / "data"), str(programs / "pg_ctl")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    as_postgres(str(programs / "initdb"), "-D", data, "-A", "trust", "--no-sync")
    as_postgres(control, "-D", data, "-o", options, "-l", str(folder / "log"), "-w", "start")
    try:
        yield f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"
    finally:
        as_postgres(control, "-D", data, "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def mlflow_server(store: str, port: int, artifacts: Path) -> Iterator[str]:
    """`mlflow server` on loopback; gives its address."""
    log = (artifacts.parent / "mlflow_server.log").open("w+")
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)),
            *("--backend-store-uri", store, "--artifacts-destination", str(artifacts)),
        ],
        env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_TRACKING_URI": store},
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
            except OSError:
                log.seek(0)
                assert server.poll() is None, log.read()
                assert time.monotonic() < deadline, log.read()
                time.sleep(0.3)
        yield address
    finally:
        os.killpg(server.pid, 15)
        server.wait(timeout=30)
        log.close()


def history_of(client: Any, run_id: str, key: str) -> list[tuple[int, float]]:
    """Every point that MLflow has of a metric, in order: (step, value)."""
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, key))
