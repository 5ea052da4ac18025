"""The commands of the README's walk-through for operators, as they stand there, one after the other."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stream_adapt.kafka.embedded import free_ports

ROOT = Path(__file__).parents[2]
HEADING = "## An operator's walk-through"
#: As the README has them: of the broker and of two members.
PORTS = ("9092", "9464", "9465")
TIMEOUT_S = 1_800

pytestmark = [pytest.mark.broker, pytest.mark.slow, pytest.mark.timeout(TIMEOUT_S + 60)]


def commands() -> Iterator[str]:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition(f"\n{HEADING}\n")[2]
    section = re.split(r"^## ", section, maxsplit=1, flags=re.MULTILINE)[0]
    yield from re.findall(r"^```bash\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)


@pytest.mark.skipif(not (shutil.which("kcat") and shutil.which("curl")), reason="kcat and curl are not installed")
def test_every_step_of_the_walk_through_does_what_it_says(tmp_path: Path) -> None:
    ports = dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True))
    script = "\n".join(["set -euo pipefail", *commands()])
    script = re.sub("|".join(PORTS), lambda found: ports[found[0]], script)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "STREAM_ADAPT_METRICS_PORT": ports["9464"],
    }
    (tmp_path / "script").write_text(script)
    with (tmp_path / "told").open("w") as told:
        shell = subprocess.Popen(
            ["bash", "-x", "script"], stdin=subprocess.DEVNULL, stdout=told, stderr=told, cwd=tmp_path,
            env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            shell.wait(TIMEOUT_S)
        finally:
            if shell.poll() != 0:  # whatever it started has not ended
                os.killpg(shell.pid, signal.SIGKILL)
    shown = (tmp_path / "told").read_text()

    assert 0 == shell.returncode, shown[-6_000:]
    assert "stream_adapt_assigned_partitions 2.0" in shown, "scaled out"
    assert re.search(r"^promoted: ", shown, re.MULTILINE), "another model"
    assert 2 == len(set(re.findall(r"│ \* │ (\S+)", shown))), "served before and after the rollback"
    assert re.search(r"1 replayed to shop\.events", shown)
