"""The one error class that users meet, and a sentence that many of them need."""

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """An error that the user can fix. The message is one line: what is wrong, where, and what to do.

    The command line prints the message without a traceback; a traceback means a bug in the pipeline.
    """


def unknown(what: str, name: str, valid: Any) -> str:
    """The sentence for an unknown name: the nearest valid name, and all of them."""
    near = difflib.get_close_matches(name, list(valid), n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"unknown {what}{hint}; valid: {', '.join(valid)}"


def find(what: str, name: str, valid: Mapping[str, T]) -> T:
    """What has that name, of a kind such as "variant".

    Raises:
        UserError: nothing has; the message has the valid names.
    """
    if name not in valid:
        raise UserError(unknown(f"{what} {name!r}", name, valid))
    return valid[name]
