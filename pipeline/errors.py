"""The one error class that users meet, and a sentence that many of them need."""

import difflib
from typing import Any


class UserError(ValueError):
    """Something the user can put right. The message is one line: what is wrong, where, and what to do.

    The command line prints the message without a traceback; a traceback means a bug of ours.
    """


def unknown(what: str, name: str, valid: Any) -> str:
    """The sentence for a name that nobody knows, with the nearest and all valid ones."""
    near = difflib.get_close_matches(name, list(valid), n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"unknown {what}{hint}; valid: {', '.join(valid)}"
