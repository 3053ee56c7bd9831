"""The per-host part: owns the host arena, serves the sessions of this host, pulls for them, speaks to the directory.

    engines ──Unix socket──> sessions ─> Memory (regions, stores) <──data server── peers (validated reads, no locks)
                                │                     │ changes
                                └─> Warmer            └─> Shards ──TCP──> the directory, or its shards

A node runs one asyncio loop in one thread; so it works as a plain process and inside a Ray actor alike. It blocks on
nothing: system calls that take long run in the loop's pool, bytes move in the transports' threads. Idle, it sleeps.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import IO

from kvshare import keys
from kvshare.answers import Answers
from kvshare.cluster_messages import Host
from kvshare.config import Settings
from kvshare.cost import Rates
from kvshare.errors import ConfigError, KVShareError
from kvshare.exposed import Exposed
from kvshare.gate import Gate
from kvshare.handover import Handover
from kvshare.link import Member
from kvshare.memory import Memory
from kvshare.messages import Drained, Expose, NodeStatus, PeerLost, Purge, Purged
from kvshare.node_session import NodeSession
from kvshare.places import GroupPlan, Location, NodeDescription, RegionDescription, Stored
from kvshare.probe import Prober
from kvshare.purge import PurgeScope
from kvshare.purging import Purger
from kvshare.region import generation_now
from kvshare.shards import Shards
from kvshare.tenants import Tenants
from kvshare.transport.choose import Transports, host_id
from kvshare.warm import Warmer
from kvshare.warm_group import Groups

log = logging.getLogger("kvshare")

START_SECONDS = 120.0  # recovery of a large arena reads all of it
STOP_SECONDS = 10.0


class Node:
    """See the module's docstring.

    settings: see `Settings`; resolve_directory: called in a thread at every (re)connect with the number of a shard of the
    directory, below ``settings.directory_shards``; returns its "host:port" or "" when there is none yet (default: what
    ``settings.directory`` names); idle_exit: end after ``idle_exit_seconds`` without sessions.
    """

    def __init__(
        self, settings: Settings, resolve_directory: Callable[[int], str] | None = None, *, idle_exit: bool = False
    ) -> None:
        self.settings = settings
        endpoints = settings.directories
        self.resolve = resolve_directory or endpoints.__getitem__
        self.shards = settings.directory_shards if resolve_directory is not None else max(1, len(endpoints))
        self.clustered = resolve_directory is not None or bool(endpoints)
        self.answers = Answers()
        self._idle_exit = idle_exit and settings.idle_exit_seconds > 0
        self._idle_timer: asyncio.TimerHandle | None = None
        self.host = host_id()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._ended = threading.Event()
        self._failure: BaseException | None = None
        self._unlink = True
        self._stopping: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="kvshare-node", daemon=True)
        self._lock_file: IO[str] | None = None
        self.sessions: dict[int, NodeSession] = {}
        self.exposed: dict[int, Exposed] = {}  # by the number of the session that exposed it
        self._session_numbers = 0
        self.namespaces: dict[bytes, keys.Namespace] = {}
        self.counters = {"sessions": 0, "refused": 0}

    # --- from any thread ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start and return when the node listens.

        Raises:
            ConfigError: another node owns this host's socket, or a setting turns out to be unusable here.
        """
        self._thread.start()
        if not self._ready.wait(START_SECONDS):
            raise ConfigError(f"the node did not start within {START_SECONDS} s")
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    def stop(self, unlink: bool = True) -> None:
        """End in good order; idempotent. ``unlink`` removes socket and arena files (memory is given back)."""
        self._unlink = unlink
        self._request_stop()
        self._ended.wait(STOP_SECONDS)

    def drain(self, seconds: float, to_peers: bool = True) -> Drained | None:
        """Hand over what only this node holds: to peers (unless not ``to_peers``), disk and object store. Returns what came of
        it, in not much more than ``seconds``; None when the node ended meanwhile. Nothing is saved here any more: `stop` it."""
        drain = self._handed_over(seconds, to_peers)
        try:
            handed_over = asyncio.run_coroutine_threadsafe(drain, self._loop)
        except RuntimeError:  # the loop is closed: it has ended
            drain.close()
            return None
        try:
            return handed_over.result(seconds + STOP_SECONDS)
        except (CancelledError, TimeoutError):
            return None

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the end, whoever asked for it. True when the node has ended."""
        return self._ended.wait(timeout)

    def status(self) -> NodeStatus:
        """As a session would be answered."""
        return asyncio.run_coroutine_threadsafe(self._status(), self._loop).result(5.0)

    def purge(self, scope: PurgeScope, destroy_key: bool = False) -> Purged:
        """Erase it from every tier of every node, as a session's `Purge`; takes as long as rewriting the object store."""
        purging = self.purger.ask(Purge(0, scope, destroy_key))
        return asyncio.run_coroutine_threadsafe(purging, self._loop).result()

    @property
    def description(self) -> NodeDescription:
        return asyncio.run_coroutine_threadsafe(self._described(), self._loop).result(5.0)

    def _request_stop(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self.stop_soon)
        except RuntimeError:
            pass  # the loop is closed: it has ended

    # --- on the loop --------------------------------------------------------------------------------------------------

    def stop_soon(self, unlink: bool | None = None) -> None:
        """End in good order. ``unlink``: as `stop`'s; None: as was said before."""
        self._unlink = self._unlink if unlink is None else unlink
        if self._stopping is not None:
            self._stopping.set()

    def describe(self) -> NodeDescription:
        endpoint = self.transports.endpoint()
        regions = self.memory.describe(self.name, endpoint)
        return NodeDescription(self.name, self._epoch, self.host, endpoint, regions, self.settings.region)

    @property
    def name(self) -> str:
        return self.settings.node_name

    def status_for(self, ask: int) -> NodeStatus:
        counters = dict(self.counters)
        for store in self.memory.stores.values():
            for name, count in store.counters.items():
                counters[name] = counters.get(name, 0) + count
        counters |= self.memory.quota.counters() | self.memory.tiers.counters | self.purger.counters
        counters["exposed_blocks"] = sum(len(exposed) for exposed in self.exposed.values())
        counters.update({f"directory_{name}": count for name, count in self.link.counters.items()})
        engines = [exposed.describe() for exposed in self.exposed.values()]
        counters["directory_cached"] = self.answers.used
        endpoint, sessions = self.link.endpoint, len(self.sessions)
        return NodeStatus(ask, self.describe(), endpoint, sessions, counters, engines, self._paths())

    def _paths(self) -> dict[str, str]:
        """How this node reads others' regions, and how fast that was."""
        now = time.monotonic()
        told = self.memory.tiers.paths(self.prober.rates, now)
        for (node, kind), way in self.transports.paths().items():
            rate = self.prober.rates.rate((node, kind), now)
            told[f"{node} {kind}"] = f"{way}, {rate / 1e6:.0f} MB/s" if rate else way
        return told

    def check(self) -> list[str]:
        return self.memory.check()

    async def _handed_over(self, seconds: float, to_peers: bool) -> Drained:
        return await self.handover.drain(seconds, to_peers)

    async def _status(self) -> NodeStatus:
        return self.status_for(0)

    def _described_anew(self) -> None:
        self.link.described()

    async def _described(self) -> NodeDescription:
        return self.describe()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._main())
        except BaseException as error:
            self._failure = error
            if self._ready.is_set():
                log.exception("kvshare: the node ended by a failure of its own")
        finally:
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()
            self._ready.set()
            self._ended.set()

    async def _main(self) -> None:
        settings = self.settings
        self._stopping = asyncio.Event()
        tenants = Tenants.load(settings.tenants_file)
        self._take_lock()
        self.gate = Gate(tenants, settings.region)
        may_read = self.gate.may_go_to if self.gate.bound else None
        self.transports = Transports(settings, self.host, self.clustered, may_read)
        self.memory = Memory(
            settings, self.transports, self.host, self._changed, self._published, self._described_anew, tenants
        )
        self.memory.gate = self.gate
        self.purger = Purger(self)
        self._epoch = generation_now()  # grows with every start, whatever the arenas do
        self.handover = Handover(self)
        self.groups = Groups(self.memory, settings)
        member = Member(
            self.name,
            self.describe,
            self._inventory,
            self._peer_joined,
            self._peer_lost,
            lambda: self.memory.free_bytes,
            self._host if self.groups.capable else None,
            self.handover.take,
            self.purger.begin,
        )
        self.link = Shards(settings, member, self.resolve, self.shards)
        warm_bytes = settings.warm_bytes if self.clustered else 0  # alone, there is nobody to pull from
        rates = Rates()
        self.prober = Prober(self.transports, rates, settings.transfer_seconds)
        self.warmer = Warmer(self.memory, self.link, self.transports, rates, self.groups, warm_bytes, settings.warm_seconds)
        linking: asyncio.Task[None] | None = None
        server: asyncio.Server | None = None
        try:
            await self.memory.open(rates)
            await self.purger.enforce()
            path = Path(settings.socket_path)
            path.unlink(missing_ok=True)
            server = await asyncio.start_unix_server(self._accepted, str(path))
            path.chmod(0o600)
            if self.clustered:
                linking = self._loop.create_task(self.link.run())
            self._watch_idle()
            self._ready.set()
            await self._stopping.wait()
        finally:
            await self._shut_down(server, linking)

    def _take_lock(self) -> None:
        """One node per socket: a lock that the kernel releases when its holder dies."""
        path = Path(self.settings.socket_path)
        lock = path.with_suffix(".lock")
        try:
            path.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            while self._lock_file is None:
                file = open(lock, "a+")  # noqa: SIM115 (held for the node's life)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if lock.exists() and os.fstat(file.fileno()).st_ino == lock.stat().st_ino:
                        self._lock_file = file  # still the file of that name: a node that just ended may have removed it
                finally:
                    if self._lock_file is None:
                        file.close()
        except BlockingIOError as error:
            raise ConfigError(
                f"setting 'node_name' cannot be {self.name!r}: a node of that name runs on this host ({path}); "
                "stop it with 'kvshare stop' or choose another name."
            ) from error
        except OSError as error:
            raise ConfigError(
                f"setting 'runtime_dir' cannot be {self.settings.runtime_dir!r}: {error}; choose a folder that we may write to."
            ) from error

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._session_numbers += 1
        session = NodeSession(self, self._session_numbers, reader, writer)
        self.sessions[session.number] = session
        self.counters["sessions"] += 1
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        try:
            await session.serve()
        except (KVShareError, OSError) as error:
            log.debug("kvshare: session %d ended: %s", session.number, error)
        finally:
            del self.sessions[session.number]
            self.memory.release(session.number)
            exposed = self.exposed.pop(session.number, None)
            if exposed is not None:
                await exposed.close()
            writer.close()
            self._watch_idle()

    async def expose(self, session: NodeSession, offer: Expose) -> None:
        """An engine offers its KV cache, in place of what it offered before."""
        former = self.exposed.pop(session.number, None)
        if former is not None:
            await former.close()
        exposed = self.exposed[session.number] = Exposed(self, session.engine, offer)
        exposed.start()

    def exposed_block(self, key: bytes, asking: int) -> Location | None:
        """Where an engine of this host, other than that of session ``asking``, has a block in its KV cache."""
        for number, exposed in self.exposed.items():
            location = exposed.lookup(key) if number != asking else None
            if location is not None and self.transports.reaches(exposed.region):
                return location
        return None

    def region_of(self, location: Location) -> RegionDescription | None:
        """What we know of the region that a location names."""
        if location.node == self.name:
            return self.memory.region(location.region, self.name, self.transports.endpoint())
        for exposed in self.exposed.values():
            if exposed.name == location.node:
                return exposed.region
        return self.memory.peer(location.node, location.region)

    def _watch_idle(self) -> None:
        if self._idle_exit and not self.sessions and self._idle_timer is None:
            leave = self.handover.leave_soon
            self._idle_timer = self._loop.call_later(self.settings.idle_exit_seconds, leave, self.settings.drain_seconds)

    def _changed(self, stored: list[Stored], removed: list[bytes]) -> None:
        """The arena changed: sessions hear at once, the directory in batches. Removals first: their slots may be reused."""
        for session in self.sessions.values():
            session.push(stored, removed)

    def _published(self, stored: list[Stored], removed: list[bytes]) -> None:
        self.link.changed(stored, removed)

    def _host(self, question: Host) -> GroupPlan | None:
        """What is given to a group is given to all of it: not what is not for everybody."""
        bound = self.gate.bound and any(self.gate.is_bound(item.key) for item in question.items)
        return None if bound else self.groups.host(question)

    def _inventory(self) -> Iterator[Stored]:
        return (block for block in self.memory.inventory() if not self.gate.bars(block.key))

    def _peer_joined(self, node: NodeDescription) -> None:
        if node.node == self.name:
            return
        known = self.memory.peers.get(node.node)
        if known is not None and known.epoch != node.epoch:
            self.answers.clear()
            self.transports.forget(node.node)
            self.prober.rates.forget(node.node)
        self.memory.peers[node.node] = node

    def _peer_lost(self, name: str) -> None:
        if self.memory.peers.pop(name, None) is not None:
            log.info("kvshare: node %s is gone", name)
            self.answers.clear()
            self.transports.forget(name)
            self.prober.rates.forget(name)
            for session in self.sessions.values():
                session.send(PeerLost(name))

    async def _shut_down(self, server: asyncio.Server | None, linking: asyncio.Task[None] | None) -> None:
        await self.handover.close()
        await self.warmer.close()
        await self.purger.close()
        self.prober.close()
        if linking is not None:
            linking.cancel()
            await asyncio.gather(linking, return_exceptions=True)
        if server is not None:
            server.close()
        for session in list(self.sessions.values()):
            session.close()
        for exposed in list(self.exposed.values()):
            await exposed.close()
        await asyncio.sleep(0)
        await self.memory.close_tiers()
        await asyncio.to_thread(self.groups.close)
        await asyncio.to_thread(self.transports.close)
        self.memory.close(self._unlink)
        path = Path(self.settings.socket_path)
        if self._ready.is_set():
            path.unlink(missing_ok=True)
        if self._lock_file is not None:
            if self._unlink and self._ready.is_set():
                path.with_suffix(".lock").unlink(missing_ok=True)
            self._lock_file.close()
