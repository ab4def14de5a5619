"""Loading a state dict with nothing missing, nothing left over and every shape right."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.errors import UserError

LISTED_KEYS = 3


def load_strict(model: nn.Module, state: Mapping[str, Tensor], names: Mapping[str, str], source: str) -> None:
    """Copy `state` into `model`, where `names` maps each expected key of `state` to the model's.

    Values are converted to the model's type and device. Raises UserError, before anything is
    copied, that opens with `source` and names the keys (as `state` has them) that do not fit.
    """
    target = model.state_dict()
    problems = [
        listed("missing", [key for key in names if key not in state]),
        listed("left over", [key for key in state if key not in names]),
        listed(
            "of another shape",
            [
                f"{key} is {shape(state[key])}, expected {shape(target[name])}"
                for key, name in names.items()
                if key in state and state[key].shape != target[name].shape
            ],
        ),
    ]
    if any(problems):
        raise UserError(f"{source} does not fit: " + "; ".join(filter(None, problems)))
    with torch.no_grad():
        for key, name in names.items():
            target[name].copy_(state[key])


def listed(what: str, keys: list[str]) -> str:
    """`2 keys missing (a, b)`, with the first few keys only; empty if there are none."""
    if not keys:
        return ""
    more = f", and {len(keys) - LISTED_KEYS} more" if len(keys) > LISTED_KEYS else ""
    plural = "key" if len(keys) == 1 else "keys"
    return f"{len(keys)} {plural} {what} ({', '.join(keys[:LISTED_KEYS])}{more})"


def shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"
