"""Processes that die: kill -9 at a chosen write of the package."""

import os
import signal

from glassbox_utils.core import files

writes = 0


def die_at(moment: int) -> None:
    """Count the writes of this process, and kill it at that one (0: never)."""
    plain = files.atomic_path

    def fatal(path, *a, **o):
        global writes
        writes += 1
        if writes == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(path, *a, **o)

    files.atomic_path = fatal
