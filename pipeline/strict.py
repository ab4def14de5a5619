"""Typed parameters as YAML gives them: what is unknown, missing or of the wrong type is one clear line."""

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import UserError, unknown


class Strict(BaseModel):
    """No unknown keys, no silent conversions (`5e-5` is a string in YAML), no mutation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


M = TypeVar("M", bound=Strict)


def validate(model: type[M], data: Any, where: str) -> M:
    """Check `data` (as YAML gives it) against `model`.

    Raises:
        UserError: one line for the first few faults, with the place, the fault and, for unknown keys, the valid ones.
    """
    try:
        return model.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        faults = [_sentence(model, fault) for fault in error.errors()]
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise UserError(f"{where}: {'; '.join(faults[:3])}{more}") from None


def _sentence(model: type[Strict], fault: Any) -> str:
    location = [part for part in fault["loc"] if part != "[key]"]
    key = ".".join(str(part) for part in location)
    if fault["type"] == "extra_forbidden":
        owner: Any = model
        for part in location[:-1]:
            owner = owner.model_fields[str(part)].annotation
        return unknown(f"key {key!r}", str(location[-1]), owner.model_fields)
    if fault["type"] == "missing":
        return f"{key!r} is missing"
    if fault["type"] in ("float_type", "float_parsing") and isinstance(fault["input"], str):
        return f"{key!r} is the text {fault['input']!r}, not a number: YAML wants 5.0e-5, not 5e-5"
    message = fault["msg"].removeprefix("Value error, ")
    return message if not key else f"{key!r} is {fault['input']!r}: {message}"
