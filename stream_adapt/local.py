"""This machine: where downloads are kept, and processes that do not outlive whoever started them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

#: Runs before the command, in the same process. The kernel kills the process when the thread that started it ends;
#: whether the parent is gone already is asked after that was arranged, so that there is no moment in between.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


def cache_folder() -> Path:
    """Where downloads are kept: `STREAM_ADAPT_CACHE_DIR`, else `stream-adapt/` in the user's XDG cache folder."""
    own = os.environ.get("STREAM_ADAPT_CACHE_DIR")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "stream-adapt"


def dying_with_parent(command: Sequence[str]) -> list[str]:
    """The command so that, on Linux, it is killed when the thread that starts it ends, even by `kill -9`.

    Elsewhere it is the command itself.
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]
