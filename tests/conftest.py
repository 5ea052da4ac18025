"""For all tests: the broker fixtures, no stale compiled code, and no process left behind by a test run."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from stream_adapt.learner import rules

pytest_plugins = ["stream_adapt.testing.broker"]

#: Helpers of Python's multiprocessing that live until the interpreter ends, and end with it.
_PYTHONS_OWN = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


def pytest_configure() -> None:
    """Drops compiled rules that are older than what they call: Numba looks only at the file of the caller."""
    folder = Path(rules.__file__).parent
    changed = max(source.stat().st_mtime for source in folder.rglob("*.py"))
    for compiled in folder.rglob("__pycache__/*.nb[ci]"):
        if compiled.stat().st_mtime < changed:
            compiled.unlink(missing_ok=True)


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
