"""A process that asks the directory and holds nothing: a router wants to know who has how much of a prompt.

    depths, namespaces (any thread, any event loop) ──> one loop in a thread of its own ──TCP──> each shard of the directory

A question is answered within the seconds that it gives itself, with None where nobody answered; a shard that is away or silent
is left out (`kvshare.overlap`). Connections heal themselves, in the background. Idle, it sends an empty question for every
heartbeat, and sleeps.

Threads: its methods may be called from any; the thread is a daemon and sleeps in epoll.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import msgspec

from kvshare import wire
from kvshare.cluster_messages import PURPOSE, AskDepths, AskNamespaces, Depths, FromDirectory, Namespaces
from kvshare.config import Settings
from kvshare.errors import Unavailable
from kvshare.fingerprints import index_seed, shard_of
from kvshare.keys import Namespace
from kvshare.messages import Message
from kvshare.overlap import Held, Part, merge, split, thin, widen
from kvshare.runs import Keys

log = logging.getLogger("kvshare")

Answer = TypeVar("Answer")

CONNECT_SECONDS = 5.0
PAUSE_SECONDS = (0.1, 2.0)  # between attempts: first, longest
KEYS_MAX = 256  # of a question: of a longer chain some, evenly spread; how far it is held need not be known better
ASKING_MAX = 1024  # questions that wait for one shard; beyond it there is no answer


class Onlooker:
    """See the module's docstring. Uses ``secret``, ``heartbeat_seconds`` and ``message_bytes_max`` of ``settings``.

    resolve: where a shard of the directory is ("host:port", "" when it is away), by its number below ``shards``; may take long,
    and may fail.
    """

    def __init__(self, settings: Settings, resolve: Callable[[int], str], shards: int = 1) -> None:
        self._seed = index_seed(settings.secret)
        self._shards = [_Shard(settings, partial(resolve, shard)) for shard in range(shards)]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="kvshare-onlooker", daemon=True)
        self._thread.start()

    def depths(self, keys: Sequence[Keys], seconds: float) -> Future[dict[str, Held] | None]:
        """What each node holds of this chain, from its head; None when nobody answers in time. Not after `close`."""
        return self._submit(self._depths(keys, seconds))

    def namespaces(self, seconds: float) -> Future[list[Namespace] | None]:
        """Of which namespaces engines have attached, latest last; None when nobody answers in time."""
        return self._submit(self._namespaces(seconds))

    def close(self) -> None:
        """End; idempotent. Questions that wait get no answer."""
        if not self._loop.is_closed():
            try:
                self._loop.call_soon_threadsafe(self._loop.stop)
            except RuntimeError:
                return  # closed meanwhile
            if self._thread is not threading.current_thread():
                self._thread.join(CONNECT_SECONDS)

    # --- on the loop --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        running = [self._loop.create_task(shard.run()) for shard in self._shards]
        try:
            self._loop.run_forever()
        finally:
            tasks = {*running, *asyncio.all_tasks(self._loop)}  # those of questions too
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.run_until_complete(asyncio.sleep(0))  # connections close one turn later
            self._loop.close()

    def _submit(self, question: Coroutine[Any, Any, Answer]) -> Future[Answer]:
        return asyncio.run_coroutine_threadsafe(question, self._loop)

    async def _depths(self, keys: Sequence[Keys], seconds: float) -> dict[str, Held] | None:
        shards, (keys, positions) = self._shards, thin(keys, KEYS_MAX)
        parts = split(keys, shard_of(keys, self._seed, len(shards)), len(shards))
        asked = [_ask_depths(shard, part, seconds) for shard, part in zip(shards, parts, strict=True)]
        held = merge(parts, await asyncio.gather(*asked), len(positions))
        return None if held is None else widen(held, positions)

    async def _namespaces(self, seconds: float) -> list[Namespace] | None:
        answer = await self._shards[0].ask(AskNamespaces, seconds)
        return answer.namespaces if isinstance(answer, Namespaces) else None


class _Shard:
    """One connection."""

    def __init__(self, settings: Settings, resolve: Callable[[], str]) -> None:
        self._settings = settings
        self._resolve = resolve
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromDirectory)
        self._asks = itertools.count(1)
        self._pending: dict[int, asyncio.Future[Message]] = {}
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, make: Callable[[int], Message], seconds: float) -> Message | None:
        if self._writer is None or len(self._pending) >= ASKING_MAX:
            return None
        if self._writer.transport.get_write_buffer_size() > self._settings.message_bytes_max:
            return None  # it does not read
        number = next(self._asks)
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._pending[number] = answer
        try:
            wire.write_frame(self._writer, self._encoder.encode(make(number)))
            async with asyncio.timeout(seconds):
                return await answer
        except (TimeoutError, Unavailable):
            return None
        finally:
            del self._pending[number]

    async def run(self) -> None:
        """Until cancelled: connect, listen, and again."""
        pause, longest = PAUSE_SECONDS
        while True:
            try:
                endpoint = await asyncio.to_thread(self._resolve)
                if not endpoint:
                    raise Unavailable("it is away")
                reader, writer = await wire.connect_async(endpoint, self._settings.secret, PURPOSE, CONNECT_SECONDS)
                pause = PAUSE_SECONDS[0]
                await self._listen(reader, writer)
            except Exception as error:  # includes whatever a resolver raises: we go on without
                log.debug("kvshare: an onlooker is without a shard of the directory: %s", error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)

    async def _listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        beating = asyncio.create_task(self._beat())
        try:
            while True:
                message = self._decoder.decode(await wire.read_frame(reader, self._settings.message_bytes_max))
                answer = self._pending.get(getattr(message, "ask", 0))
                if answer is not None and not answer.done():
                    answer.set_result(message)
        finally:
            self._writer = None
            beating.cancel()
            writer.close()
            for answer in self._pending.values():
                if not answer.done():
                    answer.set_exception(Unavailable("the directory is gone"))

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._settings.heartbeat_seconds)
            await self.ask(lambda ask: AskDepths(ask, []), self._settings.heartbeat_seconds)


async def _ask_depths(shard: _Shard, part: Part, seconds: float) -> dict[str, Held] | None:
    if not len(part.positions):
        return None
    answer = await shard.ask(lambda ask: AskDepths(ask, part.keys), seconds)
    return answer.nodes if isinstance(answer, Depths) else None
