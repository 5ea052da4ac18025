"""Apache Kafka, a member, a load and Prometheus with our rules, on loopback: `make observe`, `make observe-check`.

`observe` goes on until Ctrl-C. `observe --check` brings about what the alerts are for, asks the running Prometheus
every expression of the dashboard and of the rules, prints one JSON object, and ends with 1 if anything is amiss.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from check import run_check
from flow import drifting
from rich.console import Console
from world import Settings, World

from stream_adapt import logs
from stream_adapt.config import LogSection
from stream_adapt.errors import StreamAdaptError
from stream_adapt.shutdown import Shutdown, StopAtOnce

#: With 300 events a second: what is normal is known after a minute, and half a minute later the world moves.
_DRIFT_AFTER = 27_000
_REFRESHING = {
    "refresh": {
        "mode": "child",
        "cooldown_s": 60,
        "settle_events": 3_000,
        "window_events": 30_000,
        "training_s": 30,
        "shadow_events": 2_000,
        "watch_events": 8_000,
    }
}


def observe(folder: Path, console: Console, port: int | None) -> None:
    """Until Ctrl-C."""
    settings = Settings(leader=_REFRESHING, prometheus_port=port)
    with Shutdown().installed() as shutdown, World(settings, folder, console) as world:
        with console.status("a member"):
            world.start("a")
        world.start_load(drifting(_DRIFT_AFTER))
        prometheus = world.start_prometheus()
        for what, url in {
            "metrics": f"{world.url_of('a')}/metrics",
            "readiness": f"{world.url_of('a')}/readyz",
            "Prometheus": f"{prometheus.url}/graph",
            "alerts": f"{prometheus.url}/alerts",
            "Kafka": world.kafka.bootstrap_servers,
            "logs": str(folder),
        }.items():
            console.print(f"{what:<12}{url}")
        console.print("Ctrl-C ends it all.")
        while not shutdown.asked:
            world.supervise()
            time.sleep(0.2)


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="observe", description=__doc__)
    parser.add_argument("--check", action="store_true", help="bring about what the alerts are for, and judge")
    parser.add_argument("--port", type=int, help="Prometheus' port; any free one if not given")
    parser.add_argument("--keep", type=Path, help="new folder for logs and data; else a temporary one")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="stream-adapt-observe-"))
    folder.mkdir(parents=True, exist_ok=True)
    logs.configure(LogSection())  # stdout is for the one JSON object
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    kept = options.keep is not None
    try:
        if not options.check:
            observe(folder.resolve(), console, options.port)
            return 0
        judged = run_check(folder.resolve(), console)
        print(json.dumps(judged.shown(), indent=2))
        kept = kept or not judged.ok
        return 0 if judged.ok else 1
    except StreamAdaptError as error:
        kept = True
        logs.say(error)
        return error.exit_code
    except (KeyboardInterrupt, StopAtOnce):
        return 130
    finally:
        if kept:
            console.print(f"logs: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
