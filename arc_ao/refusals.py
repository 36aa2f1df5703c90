"""Which errors tell a user of a mistake, and which are faults of the program."""

import linecache
import traceback


def is_refusal(error: BaseException) -> bool:
    """Whether `error` says by itself what to change: the system refused (no such file, no space),
    or a `raise` statement of arc_ao did. All others need the traceback that leads to them."""
    if isinstance(error, OSError):
        return True
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    ours = frame.f_globals.get("__name__", "").partition(".")[0] == "arc_ao"
    return ours and linecache.getline(frame.f_code.co_filename, line).strip().startswith("raise ")
