"""Every alert fires in its situation and none besides, and no panel is empty, on a real Kafka and a real Prometheus."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.broker, pytest.mark.slow, pytest.mark.timeout(1_500)]


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus (Debian: prometheus) is not installed")
def test_each_alert_fires_in_its_situation_and_no_panel_is_empty() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "deploy" / "observe"), "--check"],
        cwd=ROOT, capture_output=True, text=True, timeout=1_400, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    judged = json.loads(done.stdout)

    assert {"empty": [], "not_fired": [], "false": []} == judged["named"], done.stderr
    assert judged["alerts"] == judged["alerts_fired"] > 10
    assert 0 == done.returncode
