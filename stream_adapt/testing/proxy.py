"""A TCP proxy between Kafka's clients and one listener of a broker, that makes things go wrong on request.

It knows Kafka's framing, so that a fault hits one kind of request, or its answer, and nothing else. Faults are data:

| fault      | what happens                                                                            |
|------------|-----------------------------------------------------------------------------------------|
| `Delay`    | a request or its answer comes late; what follows it on the connection waits, as in TCP  |
| `Hold`     | the same, until the fault is lifted                                                     |
| `Drop`     | it never comes                                                                          |
| `Close`    | the connection is closed instead                                                        |
| `Fail`     | the answer has an error code: instead of asking the broker, or although it did its work |
| `Cut`      | connections end now, in order or by reset                                               |
| `HalfOpen` | connections swallow everything, in both directions                                      |
| `Trickle`  | connections carry a few bytes a second                                                  |
| `Refuse`   | new connections are reset                                                               |

    with FaultProxy("127.0.0.1", 9092) as proxy:
        held = proxy.inject(Hold(Match(Api.END_TXN, count=1)))
        held.wait()          # until a client has sent one
        held.lift()

A request that is held or late reaches the broker even if its client has given up and closed the connection, as a
packet in a network can. Clients follow the addresses that brokers advertise: the broker must advertise the proxy's.
`embedded_behind_proxy` sees to that. Plain-text listeners only: what is encrypted cannot be told apart.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from stream_adapt.kafka.embedded import HOST, EmbeddedKafka, free_ports
from stream_adapt.testing.wire import SETTABLE, Api, Request, parse_correlation_id, parse_request, refusal, with_error

__all__ = [
    "Api",
    "Close",
    "Counts",
    "Cut",
    "Delay",
    "Drop",
    "Fail",
    "Fault",
    "FaultProxy",
    "HalfOpen",
    "Hold",
    "Injected",
    "Match",
    "ProxiedKafka",
    "Refuse",
    "Trickle",
    "embedded_behind_proxy",
]

Side = Literal["request", "response"]
_T = TypeVar("_T")

#: Kafka's own limit (`socket.request.max.bytes`); answers are as large as `fetch.max.bytes` asks for, far less.
_LONGEST_FRAME = 100 * 1024 * 1024
#: Room for what is read ahead: asyncio's own 64 KiB would slow large fetches down.
_BUFFER = 1024 * 1024
#: Whatever is asked of the proxy's own thread is done in moments.
_CALL_TIMEOUT_S = 10.0
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of no time: closing sends RST


@dataclass(frozen=True, slots=True)
class Match:
    """Which requests: of one kind or of every, of clients whose id fits a shell pattern, and which of them in order."""

    api: int | None = None
    client_id: str = "*"
    first: int = 1  # the how-manieth, counted from the injection
    count: int | None = None  # how many from there on; None: all

    def fits(self, request: Request) -> bool:
        """Whether kind and client are meant."""
        return self.api in (None, request.api) and fnmatchcase(request.client_id, self.client_id)

    def takes(self, number: int) -> bool:
        """Whether the `number`-th that fits is meant, from 1."""
        return self.first <= number and (self.count is None or number < self.first + self.count)


@dataclass(frozen=True, slots=True)
class Delay:
    """A request, or its answer, comes so many seconds late."""

    match: Match
    seconds: float
    at: Side = "request"


@dataclass(frozen=True, slots=True)
class Hold:
    """A request, or its answer, is kept until the fault is lifted."""

    match: Match
    at: Side = "request"


@dataclass(frozen=True, slots=True)
class Drop:
    """A request, or its answer, is lost; the connection stays."""

    match: Match
    at: Side = "request"


@dataclass(frozen=True, slots=True)
class Close:
    """The connection is closed instead of passing a request, or its answer, on."""

    match: Match
    at: Side = "request"
    reset: bool = False


@dataclass(frozen=True, slots=True)
class Fail:
    """The client is told an error of Kafka.

    At "request" the broker never hears of it, and the answer may overtake others; at "response" it did what was asked.
    Produce, InitProducerId,
    AddPartitionsToTxn, AddOffsetsToTxn, TxnOffsetCommit and EndTxn alone.
    """

    match: Match
    code: int
    at: Side = "request"


@dataclass(frozen=True, slots=True)
class Cut:
    """Open connections end, once, when this is injected."""

    client_id: str = "*"
    reset: bool = False


@dataclass(frozen=True, slots=True)
class HalfOpen:
    """Open connections swallow everything; they are reset when the fault is lifted."""

    client_id: str = "*"
    new_too: bool = False  # connections made from now on as well: the other side is gone


@dataclass(frozen=True, slots=True)
class Trickle:
    """Connections carry so many bytes a second, in each direction."""

    client_id: str = "*"
    bytes_per_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Refuse:
    """New connections are reset as soon as they are made."""


_FrameFault = Delay | Hold | Drop | Close | Fail
Fault = Delay | Hold | Drop | Close | Fail | Cut | HalfOpen | Trickle | Refuse


@dataclass(frozen=True, slots=True)
class Counts:
    """What has passed and what has happened since the proxy began, or since the last `clear`."""

    connections: int  # accepted
    requests: Mapping[int, int]  # passed on to the broker, by kind
    responses: Mapping[int, int]  # passed on to the client, by the kind of their request
    faults: Mapping[str, int]  # times that a fault did something, by its class's name


class Injected:
    """A fault at work."""

    def __init__(self, fault: Fault, proxy: FaultProxy, since: int) -> None:
        self.fault = fault
        self.hits = 0  # times that it did something
        self._fits = 0
        self._since = since  # connections with a lower number were open already
        self._proxy = proxy
        self._over = asyncio.Event()
        self._changed = threading.Condition()

    def wait(self, hits: int = 1, timeout_s: float = 30.0) -> None:
        """Returns when the fault has done something `hits` times.

        Raises:
            TimeoutError: it did not within `timeout_s` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.hits >= hits, timeout_s):
                raise TimeoutError(f"{self.fault}: {self.hits} of {hits} hits within {timeout_s:g} s")

    def lift(self) -> None:
        """Ends the fault. What is held or late goes on; connections that were half-open are reset."""
        self._proxy._lift(self)

    def _hit(self) -> None:
        with self._changed:
            self.hits += 1
            self._changed.notify_all()

    async def _over_within(self, seconds: float | None) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._over.wait(), seconds)

    def _takes(self, request: Request, side: Side) -> bool:
        """Whether it hits this frame; counts those that fit."""
        fault = self.fault
        if not isinstance(fault, _FrameFault) or fault.at != side or not fault.match.fits(request):
            return False
        self._fits += 1
        return fault.match.takes(self._fits)

    def _swallows(self, connection: _Connection) -> bool:
        fault = self.fault
        return (
            isinstance(fault, HalfOpen)
            and (fault.new_too or connection.number < self._since)
            and fnmatchcase(connection.client_id, fault.client_id)
        )


class FaultProxy:
    """Listens on a port of 127.0.0.1 and passes everything on to one listener of a broker, but for the faults.

    Args:
        target_host: of the broker's listener.
        target_port: of the broker's listener; nobody needs to listen there before the first client comes.
        port: where to listen; 0 for a free one.

    It works from construction to `close`, in a thread of its own; any thread may call its methods.
    """

    def __init__(self, target_host: str, target_port: int, *, port: int = 0) -> None:
        self.target = (target_host, target_port)
        self._faults: list[Injected] = []
        self._connections: dict[int, _Connection] = {}
        self._accepted = 0
        self._failure: BaseException | None = None
        self._counters: dict[str, Counter[Any]] = {}
        self._zero()
        listening = socket.create_server((HOST, port), backlog=128)
        self.port: int = listening.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"fault-proxy-{self.port}", daemon=True)
        self._thread.start()
        self._server = self._do(asyncio.start_server(self._accept, sock=listening, limit=_BUFFER))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def address(self) -> str:
        """`host:port` for clients."""
        return f"{HOST}:{self.port}"

    @property
    def counts(self) -> Counts:
        """What has passed and what has happened."""
        return self._do(_call(self._snapshot))

    def inject(self, fault: Fault) -> Injected:
        """Sets a fault; it works until it is lifted. Several that fit a frame work in the order of injection.

        Raises:
            ValueError: `Fail` for a kind of request whose errors cannot be set.
        """
        if isinstance(fault, Fail) and fault.match.api not in SETTABLE:
            raise ValueError(f"{fault}: give match.api one of {', '.join(sorted(Api(a).name for a in SETTABLE))}")
        return self._do(_call(lambda: self._inject(fault)))

    def clear(self) -> None:
        """Lifts all faults and sets the counters to zero.

        Raises:
            RuntimeError: the proxy itself failed, say, on a frame that it does not know.
        """
        self._do(_call(self._clear))
        self._raise_failure()

    def close(self) -> None:
        """Ends all connections and the thread; what was held is lost. Closing twice is harmless.

        Raises:
            RuntimeError: as `clear`.
        """
        if self._loop.is_closed():
            return
        self._do(self._shut_down())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._raise_failure()

    # In the callers' threads.

    def _do(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_CALL_TIMEOUT_S)

    def _lift(self, injected: Injected) -> None:
        if not self._loop.is_closed():
            self._do(_call(lambda: self._end(injected)))

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise RuntimeError(f"fault proxy at {self.address}: {failure}") from failure

    # In the proxy's thread.

    def _snapshot(self) -> Counts:
        found = {name: dict(counter) for name, counter in self._counters.items()}
        accepted = sum(found["connections"].values())
        return Counts(accepted, found["requests"], found["responses"], found["faults"])

    def _zero(self) -> None:
        self._counters = {name: Counter() for name in ("connections", "requests", "responses", "faults")}

    def _count(self, what: str, key: Any) -> None:
        self._counters[what][key] += 1

    def _inject(self, fault: Fault) -> Injected:
        injected = Injected(fault, self, self._accepted)
        if isinstance(fault, Cut):
            for connection in [c for c in self._connections.values() if fnmatchcase(c.client_id, fault.client_id)]:
                connection.end(reset=fault.reset)
                self._hit(injected)
        else:
            self._faults.append(injected)
        return injected

    def _hit(self, injected: Injected) -> None:
        injected._hit()
        self._count("faults", type(injected.fault).__name__)

    def _end(self, injected: Injected) -> None:
        if injected in self._faults:
            self._faults.remove(injected)
        injected._over.set()
        if isinstance(injected.fault, HalfOpen):
            for connection in [c for c in self._connections.values() if c.swallowed]:
                connection.end(reset=True)

    def _clear(self) -> None:
        for injected in list(self._faults):
            self._end(injected)
        self._zero()

    async def _shut_down(self) -> None:
        self._server.close()
        tasks = [connection.task for connection in self._connections.values() if connection.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number, self._accepted = self._accepted, self._accepted + 1
        self._count("connections", None)
        refusing = next((i for i in self._faults if isinstance(i.fault, Refuse)), None)
        if refusing:
            self._hit(refusing)
            _end(writer, reset=True)
            return
        try:
            upstream = await asyncio.open_connection(*self.target, limit=_BUFFER)
        except OSError:  # no broker: the nearest to what its own port would say
            _end(writer, reset=True)
            return
        connection = _Connection(self, number, _Stream(reader, writer), _Stream(*upstream), asyncio.current_task())
        self._connections[number] = connection
        try:
            await connection.run()
        except ExceptionGroup as failures:
            self._failure = self._failure or failures.exceptions[0]
        finally:
            connection.end()
            del self._connections[number]


@dataclass(slots=True)
class _Stream:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)  # both pumps may write to a client

    async def frame(self) -> bytes | None:
        """The next frame, without its length; None at the end."""
        try:
            length = int.from_bytes(await self.reader.readexactly(4), "big", signed=True)
            if not 0 <= length <= _LONGEST_FRAME:
                raise ValueError(f"a frame of {length} bytes: is this a plain-text listener of Kafka?")
            return await self.reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None


class _Lost(Exception):
    """This frame does not go on."""


@dataclass(slots=True)
class _Connection:
    """One client's connection and ours to the broker: two pumps."""

    proxy: FaultProxy
    number: int
    client: _Stream
    broker: _Stream
    task: asyncio.Task[Any] | None
    client_id: str = ""
    swallowed: bool = False
    waiting: dict[int, Request] = field(default_factory=dict)

    async def run(self) -> None:
        """Until either side has closed, and what was late or held on the way to the broker has arrived."""
        async with asyncio.TaskGroup() as pumps:
            pumps.create_task(self._requests())
            pumps.create_task(self._responses())

    def end(self, *, reset: bool = False) -> None:
        _end(self.client.writer, reset=reset)
        _end(self.broker.writer, reset=False)

    async def _requests(self) -> None:
        while (frame := await self.client.frame()) is not None:
            request = parse_request(frame)
            self.client_id = request.client_id
            try:
                await self._suffer(request, frame, "request")
            except _Lost:
                continue
            self.waiting[request.correlation_id] = request
            self.proxy._count("requests", request.api)
            await self._write(self.broker, frame)
        self.broker.writer.close()

    async def _responses(self) -> None:
        while (frame := await self.broker.frame()) is not None:
            request = self.waiting.pop(parse_correlation_id(frame))
            try:
                frame = await self._suffer(request, frame, "response")
            except _Lost:
                continue
            self.proxy._count("responses", request.api)
            await self._write(self.client, frame)
        self.client.writer.close()

    async def _suffer(self, request: Request, frame: bytes, side: Side) -> bytes:
        """The frame after all faults that hit it; raises _Lost if nothing is left."""
        for injected in list(self.proxy._faults):
            if injected._swallows(self):
                self.swallowed = True
                self.proxy._hit(injected)
                raise _Lost
            if injected._takes(request, side):
                self.proxy._hit(injected)
                frame = await self._strike(injected, request, frame, side)
        return frame

    async def _strike(self, injected: Injected, request: Request, frame: bytes, side: Side) -> bytes:
        match injected.fault:
            case Delay(seconds=seconds):
                await injected._over_within(seconds)
            case Hold():
                await injected._over_within(None)
            case Drop():
                raise _Lost
            case Close(reset=reset):
                self.end(reset=reset)
                raise _Lost
            case Fail(code=code) if side == "response":
                return with_error(request, frame, code)
            case Fail(code=code):
                await self._write(self.client, refusal(request, frame, code))
                raise _Lost
        return frame

    async def _write(self, to: _Stream, frame: bytes) -> None:
        """Writes a frame, slowly if a fault says so; one that nobody takes any more is lost."""
        data = len(frame).to_bytes(4, "big") + frame
        async with to.writing:
            with contextlib.suppress(ConnectionError):
                await self._send(to, data)

    async def _send(self, to: _Stream, data: bytes) -> None:
        while data and (trickle := self._trickle()):
            injected, pause_s = trickle
            self.proxy._hit(injected)
            to.writer.write(data[:1])
            data = data[1:]
            await to.writer.drain()
            await injected._over_within(pause_s)
        to.writer.write(data)
        await to.writer.drain()

    def _trickle(self) -> tuple[Injected, float] | None:
        """The fault that slows this connection down, and the seconds from byte to byte."""
        for injected in self.proxy._faults:
            fault = injected.fault
            if isinstance(fault, Trickle) and fnmatchcase(self.client_id, fault.client_id):
                return injected, 1 / fault.bytes_per_s
        return None


def _end(writer: asyncio.StreamWriter, *, reset: bool) -> None:
    if reset and not writer.is_closing():
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        writer.transport.abort()
    else:
        writer.close()


async def _call(act: Callable[[], _T]) -> _T:
    return act()


@dataclass(frozen=True, slots=True)
class ProxiedKafka:
    """An embedded Kafka, reached by `kafka.bootstrap_servers` directly and by each proxy's `address` through it."""

    kafka: EmbeddedKafka
    proxies: tuple[FaultProxy, ...]

    @property
    def proxy(self) -> FaultProxy:
        """The first proxy."""
        return self.proxies[0]


@contextlib.contextmanager
def embedded_behind_proxy(
    data_dir: Path | None = None, properties: Mapping[str, str] | None = None, *, proxies: int = 1, **options: Any
) -> Iterator[ProxiedKafka]:
    """An embedded Kafka with a listener for each proxy that it advertises at that proxy's port.

    Args:
        data_dir, properties, options: as `EmbeddedKafka` takes them; without `listeners` and the like.
        proxies: how many. Members behind different proxies suffer different faults; so do clients by their id.

    Raises:
        ConfigError, KafkaRefused: as `EmbeddedKafka.start`.
    """
    with contextlib.ExitStack() as stack:
        made = tuple(stack.enter_context(FaultProxy(HOST, port)) for port in free_ports(proxies))
        names = [f"PROXY{i}" for i in range(proxies)]
        listeners = {
            "listeners": ",".join(f"{n}://{HOST}:{p.target[1]}" for n, p in zip(names, made, strict=True)),
            "advertised.listeners": ",".join(f"{n}://{p.address}" for n, p in zip(names, made, strict=True)),
            "listener.security.protocol.map": ",".join(f"{n}:PLAINTEXT" for n in names),
        }
        kafka = stack.enter_context(EmbeddedKafka(data_dir, None, {**(properties or {}), **listeners}, **options))
        yield ProxiedKafka(kafka, made)
