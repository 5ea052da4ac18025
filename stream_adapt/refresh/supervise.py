"""The controller as a child of `stream-adapt run`: started with it, started again when it dies, ended with it.

`python -m stream_adapt.refresh.supervise` is the child; its configuration comes as JSON on stdin, secrets as
references. What happens to it never reaches the loop: a member goes on without.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import structlog

from stream_adapt.config import Config
from stream_adapt.local import dying_with_parent

log = structlog.get_logger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
#: A child that lived for so long was well.
_WELL_S = 300.0
_END_S = 15.0
_LOOK_S = 0.5
_COMMAND = (sys.executable, "-m", "stream_adapt.refresh.supervise")


@contextmanager
def supervised(config: Config, command: Sequence[str] = _COMMAND) -> Iterator[None]:
    """A controller runs beside the block."""
    stop = threading.Event()
    # The kernel ends the child when the thread that started it ends: so the thread stays with it.
    thread = threading.Thread(target=_supervise, args=(config, command, stop), name="refresh", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(2 * _END_S)


def _supervise(
    config: Config, command: Sequence[str], stop: threading.Event, clock: Callable[[], float] = time.monotonic
) -> None:
    pause_s = _FIRST_PAUSE_S
    while not stop.is_set():
        started = clock()
        child = _start(config, command)
        while child.poll() is None and not stop.wait(_LOOK_S):
            pass
        if stop.is_set():
            _end(child)
            return
        pause_s = _FIRST_PAUSE_S if clock() - started > _WELL_S else pause_s
        log.warning("the refresh controller ended; it is started again", code=child.returncode, pause_s=pause_s)
        stop.wait(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _start(config: Config, command: Sequence[str]) -> subprocess.Popen[bytes]:
    child = subprocess.Popen(dying_with_parent(command), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert child.stdin is not None
    try:
        child.stdin.write(config.model_dump_json().encode())
        child.stdin.close()
    except BrokenPipeError:  # it died at once; its exit code is told like any other's
        pass
    return child


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(_END_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait(_END_S)


def main() -> int:
    """The child."""
    from stream_adapt import logs
    from stream_adapt.errors import StreamAdaptError
    from stream_adapt.refresh.controller import Controller
    from stream_adapt.shutdown import Shutdown, StopAtOnce

    config = Config.model_validate(json.load(sys.stdin))
    logs.configure(config.log)
    shutdown = Shutdown()
    try:
        with shutdown.installed():
            Controller(config).run(shutdown)
    except StreamAdaptError as error:
        logs.say(error)
        return error.exit_code
    except StopAtOnce:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
