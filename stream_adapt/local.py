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
if niceness := int(sys.argv[2]):
    os.setpriority(os.PRIO_PROCESS, 0, max(niceness, os.getpriority(os.PRIO_PROCESS, 0)))
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[3], sys.argv[3:])
"""


def cache_folder() -> Path:
    """Where downloads are kept: `STREAM_ADAPT_CACHE_DIR`, else `stream-adapt/` in the user's XDG cache folder."""
    own = os.environ.get("STREAM_ADAPT_CACHE_DIR")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "stream-adapt"


def dying_with_parent(command: Sequence[str], niceness: int = 0) -> list[str]:
    """The command so that, on Linux, it is killed when the thread that starts it ends, even by `kill -9`.

    It is nice from the beginning: on Linux a process that makes itself nice later does so for one thread alone, and
    importing is the most of what a short one does. Elsewhere it is the command itself.
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), str(niceness), *command]


def be_nice(niceness: int) -> None:
    """Makes this process so nice, if it is not already: for where `dying_with_parent` could not."""
    os.setpriority(os.PRIO_PROCESS, 0, max(niceness, os.getpriority(os.PRIO_PROCESS, 0)))
