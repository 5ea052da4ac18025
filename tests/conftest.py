"""For all tests: the broker fixtures, and the promise that a test run leaves no process behind."""

from __future__ import annotations

import psutil
import pytest

pytest_plugins = ["stream_adapt.testing.broker"]

#: Helpers of Python's multiprocessing that live until the interpreter ends, and end with it.
_PYTHONS_OWN = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run when it leaves a child process: a broker, a consumer, a worker."""
    if session.config.pluginmanager.hasplugin("dsession"):
        return  # pytest-xdist's workers look after their own children
    left = [told for child in psutil.Process().children(recursive=True) if (told := _describe(child))]
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.write_line("left behind: " + "; ".join(left), red=True)


def _describe(child: psutil.Process) -> str | None:
    """What a left child is; None if it is gone by now, or none of ours."""
    try:
        command = " ".join(child.cmdline())
        alive = child.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    if not alive or any(own in command for own in _PYTHONS_OWN):
        return None
    return f"{child.pid} {command[:200]}"
