"""The watchdog: a call that does not come back ends the process, and nothing else does."""

from __future__ import annotations

import subprocess
import sys

from stream_adapt.errors import KafkaRefused
from stream_adapt.kafka.producer import OutputProducer
from stream_adapt.watchdog import Watchdog

HANGS = """
import time
from stream_adapt.watchdog import Watchdog
dog = Watchdog()
dog.start()
with dog.watch("commit_transaction", 1.0):
    time.sleep(60)
"""


def test_a_call_that_does_not_come_back_ends_the_process() -> None:
    ended = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=50, check=False)
    assert KafkaRefused.exit_code == ended.returncode
    assert "commit_transaction" in ended.stdout + ended.stderr


def test_calls_that_come_back_end_nothing_however_many_they_are() -> None:
    ended: list[int] = []
    dog = Watchdog(ended.append)
    for _ in range(10):
        with dog.watch("flush", 3.0):
            dog.look(1.0)
            dog.look(1.0)
    dog.look(100.0)
    assert [] == ended


def test_time_in_which_the_process_stood_still_is_not_the_calls() -> None:
    ended: list[int] = []
    dog = Watchdog(ended.append)
    with dog.watch("flush", 3.0):
        dog.look(1.0)
        dog.look(600.0)  # SIGSTOP
        assert [] == ended
        dog.look(1.0)
        dog.look(1.0)
    assert [KafkaRefused.exit_code] == ended


def test_every_call_of_the_producer_is_watched() -> None:
    watched: list[str] = []
    dog = Watchdog()

    def watch(call: str, seconds: float):  # type: ignore[no-untyped-def]
        watched.append(call)
        return dog.watch(call, seconds)

    class Client:
        def __init__(self, _settings: object) -> None:
            """Takes what a producer is given."""

        def __getattr__(self, _name: str):  # type: ignore[no-untyped-def]
            return lambda *_arguments: 0

        def __len__(self) -> int:
            return 0

    made = OutputProducer(
        {},
        transactional_id="t",
        socket_timeout_s=1.0,
        deadline_s=1.0,
        client=Client,
        watch=watch,  # type: ignore[arg-type]
    )
    made.begin()
    made.send_offsets([], b"")
    made.commit()
    made.abort()
    made.poll()
    made.flush()
    names = ["begin_transaction", "send_offsets_to_transaction", "commit_transaction", "abort_transaction", "poll"]
    assert ["init_transactions", *names, "flush"] == watched
