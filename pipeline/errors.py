"""The one error class that users meet."""


class UserError(ValueError):
    """Something the user can put right. The message is one line: what is wrong, where, and what to do.

    The command line prints the message without a traceback; a traceback means a bug of ours.
    """
