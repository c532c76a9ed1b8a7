"""The one exception type of the plugin."""

from __future__ import annotations


class KAFError(RuntimeError):
    """Bad input or a broken environment.

    The message names the file or option, what was found, what was expected, and the fix. Command-line tools show the
    message without a traceback; inside nnU-Net's commands it is the last line of the traceback.
    """


def one_line(error: object) -> str:
    """The text of somebody else's error within a message of ours: torch's have many lines."""
    return " ".join(str(error).split())
