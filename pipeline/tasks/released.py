"""Released weights in the place of a training's, for what starts from them."""

from collections.abc import Mapping
from pathlib import Path

from pipeline import paths
from pipeline.config import Params
from pipeline.errors import UserError
from pipeline.models import load_released
from pipeline.tasks.description import Task, load
from pipeline.train import checkpoint, history


def take_released(params: Params, task: Task, variant: str, outputs: Mapping[str, Path]) -> None:
    """Write the authors' weights to where the training's would be, with empty curves and no cost."""
    names = load(task.released)
    if variant not in names:
        raise UserError(f"there are no released weights of {variant}: compose {task.section}.weights=trained")
    file = Path(params.released.folder) / names[variant]
    model = load_released(load(task.create)(variant, task.data.section(params).num_classes), file)
    checkpoint.write(outputs["weights.pt"], {"model": model.state_dict()})
    history.write_curve([], outputs["curve.csv"])
    history.write_validation([], outputs["validation.csv"])
    with paths.written_atomically(outputs["cost.json"]) as temporary:
        temporary.write_text("{}\n")
