"""Sockets around the directory: authenticated TCP, one asyncio loop in a thread of its own.

    nodes ──TCP──> connection ── Heard ──> Directory ── commands ──> connections' outboxes
                                  Tick ──↗ (one timer, for the next heartbeat that would be missed)

The loop runs in a daemon thread, so that a server works alike in a Ray actor, a command-line process and a test. All state
is touched on the loop only; `node_lost`, `status`, `stop` may be called from any thread.

Limits: connections, bytes of a frame and of an outbox (``message_bytes_max``), seconds of a handshake and of silence. A node
that does not read is cut off; it comes back, joins and publishes everything. Idle, the server sleeps.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import msgspec

from kvshare import wire
from kvshare.cluster_messages import PURPOSE, DirectoryStatus, ToDirectory
from kvshare.config import Settings
from kvshare.directory import Directory
from kvshare.directory_events import Broadcast, Close, Connected, Disconnected, Event, Heard, Lost, Send, Tell, Tick
from kvshare.errors import AuthenticationError, ConfigError, KVShareError, ProtocolError, Unavailable
from kvshare.tenants import Tenants

log = logging.getLogger("kvshare")

CONNECTIONS_MAX = 8192
RECEIVE_BUFFER_BYTES = 1 << 20
START_SECONDS = 30.0
STOP_SECONDS = 10.0
ANSWER_SECONDS = 5.0
SAID_MAX = 1024  # different lines that are remembered as said; then they may be said again


class DirectoryServer:
    """See the module's docstring. Uses ``bind``, ``port``, ``secret``, ``tenants_file`` and the limits of ``settings``.
    ``shard`` of ``shards``: which part of the directory it serves.

    Raises:
        ConfigError: the tenants' file cannot be used.
    """

    def __init__(self, settings: Settings, shard: int = 0, shards: int = 1) -> None:
        self._settings = settings
        tenants = Tenants.load(settings.tenants_file)
        self._directory = Directory(settings, time.time_ns(), tenants=tenants, shard=shard, shards=shards)
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToDirectory)
        self._encoder = msgspec.msgpack.Encoder()
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._numbers = itertools.count(1)
        self._timer: asyncio.TimerHandle | None = None
        self._said: set[str] = set()
        self._endpoint = ""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    # --- from any thread ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start and return when the server listens; once in its life.

        Raises:
            ConfigError: no secret, or the address cannot be had.
        """
        assert self._thread is None
        if len(self._settings.secret) < 16:
            raise ConfigError(
                f"setting 'secret' cannot be {'*' * len(self._settings.secret)!r}: a directory needs one of 16 characters or "
                "more, the same on every host of the cluster."
            )
        self._thread = threading.Thread(target=self._run, name="kvshare-directory", daemon=True)
        self._thread.start()
        if not self._ready.wait(START_SECONDS):
            raise ConfigError(f"the directory did not start within {START_SECONDS} s")
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    @property
    def endpoint(self) -> str:
        """ "host:port" that nodes connect to; empty before `start`."""
        return self._endpoint

    def node_lost(self, node: str) -> None:
        """Whoever supervises nodes knows that this one is dead: forget it now, not at its missing heartbeat."""
        self._call(lambda: self._feed(Lost(node)))

    def status(self) -> DirectoryStatus:
        """Who is here and how much is known. Raises Unavailable when the server does not run."""
        answer: Future[DirectoryStatus] = Future()
        if not self._call(lambda: answer.set_result(self._directory.status())):
            raise Unavailable("the directory does not run")
        try:
            return answer.result(ANSWER_SECONDS)
        except TimeoutError as error:
            raise Unavailable("the directory is too busy to answer, or was stopped") from error

    def stop(self) -> None:
        """End in good order; idempotent."""
        self._call(self._stop_soon)
        if self._thread is not None:
            self._thread.join(STOP_SECONDS)

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the end, whoever asked for it. True when the server has ended."""
        if self._thread is not None:
            self._thread.join(timeout)
        return self._thread is None or not self._thread.is_alive()

    def _call(self, action: Callable[[], None]) -> bool:
        """Have the loop do it. False when there is no loop any more."""
        if self._loop is None:
            return False
        try:
            self._loop.call_soon_threadsafe(action)
        except RuntimeError:
            return False
        return True

    # --- on the loop --------------------------------------------------------------------------------------------------

    def _stop_soon(self) -> None:
        if self._stopping is not None:
            self._stopping.set()

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            self._failure = error
            if self._ready.is_set():
                log.exception("kvshare: the directory ended by a failure of its own")
        finally:
            self._ready.set()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        server = await self._listen()
        try:
            host, port = server.sockets[0].getsockname()[:2]
            host = self._settings.bind if self._settings.bind else host
            self._endpoint = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            self._ready.set()
            await self._stopping.wait()
        finally:
            if self._timer is not None:
                self._timer.cancel()
            await self._end_connections()
            server.close()

    async def _end_connections(self) -> None:
        """Until no task is left but ours; new connections end as they begin. Only then may the server be closed: asyncio
        loses the socket of a connection that it is just accepting."""
        assert self._loop is not None
        deadline = self._loop.time() + STOP_SECONDS / 2
        while (others := asyncio.all_tasks() - {asyncio.current_task()}) and self._loop.time() < deadline:
            for writer in self._writers.values():
                writer.transport.abort()
            await asyncio.wait(others, timeout=deadline - self._loop.time())

    async def _listen(self) -> asyncio.Server:
        bind, port = self._settings.bind, self._settings.port
        try:
            return await asyncio.start_server(self._accepted, bind, port, limit=RECEIVE_BUFFER_BYTES, backlog=1024)
        except OSError as error:
            raise ConfigError(
                f"settings 'bind' and 'port' cannot be {bind!r} and {port}: {error.strerror or error}; "
                "use an address of this host, and a port that is free (0 takes one)."
            ) from error

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert self._stopping is not None
        if self._stopping.is_set():
            writer.transport.abort()
            return
        if len(self._writers) >= CONNECTIONS_MAX:
            self._say(f"more than {CONNECTIONS_MAX} connections: further ones are refused")
            writer.transport.abort()
            return
        number = next(self._numbers)
        self._writers[number] = writer
        try:
            await self._serve(number, reader, writer)
        except AuthenticationError as error:
            self._say(f"{_host_of(writer)} was refused: {error}")
        except (KVShareError, OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            log.debug("kvshare: connection %d of the directory ended: %s", number, error)
        except Exception:
            log.exception("kvshare: the directory dropped connection %d for a failure of its own", number)
        finally:
            del self._writers[number]
            writer.transport.abort()
            self._feed(Disconnected(number))

    async def _serve(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        purpose = await wire.accept_async(reader, writer, self._settings.secret)
        if purpose != PURPOSE:
            raise ProtocolError(f"a connection for {purpose!r} came to the directory")
        self._feed(Connected(number))
        while True:
            frame = await wire.read_frame(reader, self._settings.message_bytes_max)
            self._feed(Heard(number, self._decoder.decode(frame)))

    def _feed(self, event: Event) -> None:
        assert self._loop is not None
        for command in self._directory.handle(event, self._loop.time()):
            match command:
                case Send(connection=connection, message=message):
                    self._send(connection, self._encoder.encode(message))
                case Broadcast(connections=connections, message=message):
                    payload = self._encoder.encode(message)
                    for connection in connections:
                        self._send(connection, payload)
                case Close(connection=connection, reason=reason):
                    self._say(reason)
                    self._cut(connection)
                case Tell(text=text):
                    self._say(text)
        self._arm()

    def _send(self, connection: int, payload: bytes) -> None:
        writer = self._writers.get(connection)
        if writer is None or writer.is_closing():
            return
        bytes_max = self._settings.message_bytes_max
        if len(payload) > bytes_max:
            # The node would end its connection, come back and get the same again.
            self._say(f"an answer of over {bytes_max} bytes was not sent: raise 'message_bytes_max' on every host")
            return
        wire.write_frame(writer, payload)
        if writer.transport.get_write_buffer_size() > bytes_max:
            self._say(f"{_host_of(writer)} does not read what the directory sends: cut off until it joins again")
            self._cut(connection)

    def _cut(self, connection: int) -> None:
        """Its reader fails, and tells the directory."""
        writer = self._writers.get(connection)
        if writer is not None:
            writer.transport.abort()

    def _arm(self) -> None:
        """One timer at most. One that is early, since nodes were heard of meanwhile, is armed anew when it fires; one that
        would be late, since joiners wait for a group, is replaced."""
        assert self._loop is not None and self._stopping is not None
        deadline = self._directory.next_deadline()
        if deadline is None or self._stopping.is_set():
            return
        if self._timer is not None and self._timer.when() <= deadline:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(deadline, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._feed(Tick())

    def _say(self, text: str) -> None:
        if text in self._said:
            log.debug("kvshare: %s", text)
            return
        if len(self._said) >= SAID_MAX:
            self._said.clear()
        self._said.add(text)
        log.warning("kvshare: %s", text)


def _host_of(writer: asyncio.StreamWriter) -> str:
    address = writer.get_extra_info("peername")
    return str(address[0]) if address else "someone"
