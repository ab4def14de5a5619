"""Trained models in MLflow's registry, one version for each run, the best seed's under the alias `best`.

The model is logged as a pickled module of this package: `mlflow.pytorch.load_model("models:/…@best")` gives the
`nn.Module` itself, in this checkout's environment.
"""

import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from pipeline.catalogue import find_task
from pipeline.tasks.description import load
from pipeline.tracking.about import About
from pipeline.tracking.mirror import Mirror
from pipeline.tracking.server import Server

EXAMPLE_PX = 64
"""Most models take any multiple of 32, and an example is kept as text."""


def registered_name(task: str, variant: str, scale: str) -> str:
    """As `poolformer_s12-classifier-demo`: weights of different data are different models."""
    return f"{variant}-{task}-{scale}"


def register(server: Server, folder: Path) -> bool:
    """Log a finished training's model, once; False when MLflow did not take it."""
    mirror, about = Mirror(server, folder), About.read(folder)
    weights = folder / "out/weights.pt"
    if about is None or mirror.run_id is None or "model_version" in mirror.state or not weights.exists():
        return True
    return server.attempt(lambda client: _register(client, mirror, about, weights))


def _register(client: Any, mirror: Mirror, about: About, weights: Path) -> None:
    run_id = str(mirror.run_id)
    known = client.search_model_versions(f"run_id = '{run_id}'")
    version = known[0].version if known else _log(client, run_id, about, weights)
    mirror.note(model_version=str(version))


def _log(client: Any, run_id: str, about: About, weights: Path) -> str:
    import mlflow
    import numpy as np
    import torch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    call = json.loads((weights.parent.parent / "work.json").read_text())["arguments"]
    task = find_task(about.kind)
    with torch.device("meta"):  # no random weights for those of the file to replace
        model = load(task.create)(
            variant=call["variant"], num_classes=call["num_classes"], **task.creation(call)
        ).eval()
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True)["model"], assign=True)

    classes, example_px = call["num_classes"], getattr(model, "expects", None) or EXAMPLE_PX
    output = (-1, classes, -1, -1) if task.is_dense else (-1, classes)
    single = np.dtype("float32")
    signature = ModelSignature(
        Schema([TensorSpec(single, (-1, 3, -1, -1), "images")]), Schema([TensorSpec(single, output, "logits")])
    )
    name = registered_name(about.kind, about.tags["variant"], about.scale)
    before = client.get_run(run_id).info
    with _quietly(), mlflow.start_run(run_id=run_id):
        logged = mlflow.pytorch.log_model(
            model,
            name="model",
            signature=signature,
            input_example={
                "images": np.zeros((1, 3, example_px, example_px), single)
            },  # an image of ImageNet's mean colour
            pip_requirements=[f"torch=={torch.__version__}", "timm"],
            serialization_format="pickle",
            registered_model_name=name,
        )
    client.set_terminated(run_id, before.status, before.end_time)  # logging is no part of the training's time
    version = str(logged.registered_model_version)
    client.set_model_version_tag(name, version, "seed", about.tags["seed"])
    client.update_model_version(name, version, f"{about.name}, `{about.tags['command']}`")
    return version


@contextmanager
def _quietly() -> Iterator[None]:
    """MLflow warns of pickles, which are our own, and announces each version, past its logger."""
    logger = logging.getLogger("mlflow.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    logger.setLevel(level)
