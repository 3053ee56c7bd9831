"""One NIXL agent: our side of its Python bindings, with errors that say what to do.

    register ──> metadata (bytes) ──any channel──> hold ──> request ──> post ──> done? ... ──> release

What is done about NIXL's habits (each was measured; docs/decisions/0009-nixl.md):

* Its progress thread waits for events, a tenth of a second at most: with the value that NIXL's own Python class sets it burns
  a processor. Without that thread a peer's first transfer to us would wait for ours.
* Never its listener (it has no authentication) and never its pickled descriptors.
* A corrupt description spoils an agent's name for good: descriptions carry a digest, so that NIXL sees none.
* Once a peer is disconnected, nobody can tell when a transfer with it is over: so it stays connected while it is in use.

Threads: all methods from any thread; NIXL's own lock is on (STRICT). `post` may copy inline, for as long as that takes, without
the GIL.
"""

from __future__ import annotations

import importlib
import os
import threading
import uuid
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from kvshare.transport.nixl_errors import KINDS, BadMetadata, NixlError, NixlMissing, translated

U64 = npt.NDArray[np.uint64]
I32 = npt.NDArray[np.int32]

VERSION = 1  # of `Connection`
PROGRESS_MICROSECONDS = 100_000  # longest sleep of NIXL's progress thread; it wakes up earlier when something arrives
DRAM, VRAM = "DRAM", "VRAM"
_ENVIRONMENT = {
    "NIXL_LOG_LEVEL": "WARN",  # else it writes to stdout
    "UCX_RCACHE_MAX_UNRELEASED": "1024",
}


@cache
def _bindings() -> Any:
    """NIXL's own module.

    Raises:
        NixlMissing: it is not installed, or cannot be loaded here.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        return importlib.import_module("nixl._bindings")
    except (ImportError, OSError) as error:
        raise NixlMissing(f"NIXL cannot be loaded: {error}; install the packages nixl and nixl-cu12 (or nixl-cu13)") from error


@cache
def available() -> str:
    """Empty, or why NIXL cannot be used in this process. Asked once."""
    try:
        Agent().close()
    except NixlMissing as error:
        return str(error)
    return ""


class Connection(msgspec.Struct, frozen=True, array_like=True):
    """What a peer must know to reach memory of an agent: pieces of NIXL metadata, the first with the agent's addresses."""

    version: int
    agent: str
    digest: int  # xxh3 of the pieces
    pieces: tuple[bytes, ...]


def packed(agent: str, pieces: Sequence[bytes]) -> bytes:
    return msgspec.msgpack.encode(Connection(VERSION, agent, xxhash.xxh3_64_intdigest(b"".join(pieces)), tuple(pieces)))


def unpacked(metadata: bytes) -> Connection:
    """Raises BadMetadata: it is damaged or of another version."""
    try:
        found = msgspec.msgpack.decode(metadata, type=Connection)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadMetadata(f"the peer's NIXL metadata is damaged ({error}); it must be described afresh") from error
    if found.version != VERSION:
        raise BadMetadata(f"the peer's NIXL metadata has version {found.version}, ours {VERSION}: run one kvshare on all hosts")
    if xxhash.xxh3_64_intdigest(b"".join(found.pieces)) != found.digest or not found.pieces:
        raise BadMetadata("the peer's NIXL metadata is damaged (its digest differs); it must be described afresh")
    return found


class Registration(NamedTuple):
    """Memory that NIXL knows, until `Agent.deregister`."""

    descriptors: Any
    ranges: tuple[tuple[int, int], ...]  # address and length
    kind: str
    device: int


class _Peer:
    def __init__(self) -> None:
        self.pieces: set[bytes] = set()  # that NIXL has
        self.known: set[int] = set()  # digests of connections all of whose pieces it has
        self.users = 0
        self.leaving = False  # to be disconnected by the last user
        self.lists: list[int] = []


class Agent:
    """See the module's docstring.

    Raises:
        NixlMissing: NIXL or its UCX backend cannot be had.
    """

    def __init__(self) -> None:
        self._nixl = nixl = _bindings()
        self.name = uuid.uuid4().hex
        config = nixl.nixlAgentConfig()
        config.useProgThread, config.useListenThread = True, False
        config.syncMode = nixl.NIXL_THREAD_SYNC_STRICT
        config.pthrDelay = PROGRESS_MICROSECONDS
        try:
            self._agent = nixl.nixlAgent(self.name, config)
            self._backend = self._agent.createBackend("UCX", {})
        except Exception as error:
            chosen = ", ".join(f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("UCX_"))
            raise NixlMissing(
                f"NIXL has no UCX backend here: {error}; UCX_TLS, where it is set, must allow tcp as well ({chosen})"
            ) from error
        self._segments = {DRAM: nixl.DRAM_SEG, VRAM: nixl.VRAM_SEG}
        self._operations = (nixl.NIXL_READ, nixl.NIXL_WRITE)
        self._success = nixl.NIXL_SUCCESS
        self._registrations: set[int] = set()
        self._peers: dict[str, _Peer] = {}
        self._lock = threading.Lock()
        self._connecting = threading.Lock()
        self._post, self._status = self._agent.postXferReq, self._agent.getXferStatus

    # --- memory -------------------------------------------------------------------------------------------------------

    def register(self, ranges: Sequence[tuple[int, int]], kind: str = DRAM, device: int = 0) -> Registration:
        """Let peers, and our own requests, use these ranges (address, length) until `deregister`; they must stay mapped as long
        as the agent lives: over TCP a read of memory that is gone ends this process.

        Raises:
            NixlError: they cannot be registered (RDMA pins them: `ulimit -l`).
        """
        rows = [(address, length, device, "") for address, length in ranges]
        try:
            descriptors = self._nixl.nixlRegDList(self._segments[kind], rows)
            self._agent.registerMem(descriptors, [self._backend])
        except Exception as error:
            raise translated(
                error, f"registering {sum(r[1] for r in ranges)} bytes ({kind}; is `ulimit -l` large enough?)"
            ) from error
        made = Registration(descriptors, tuple(ranges), kind, device)
        with self._lock:
            self._registrations.add(id(descriptors))
        return made

    def deregister(self, registration: Registration) -> None:
        """No more requests with this memory. Peers may still reach it by what they know; so it stays mapped."""
        with self._lock:
            self._registrations.remove(id(registration.descriptors))
        try:
            self._agent.deregisterMem(registration.descriptors, [self._backend])
        except Exception as error:
            raise translated(error, "deregistering memory") from error

    @property
    def registrations(self) -> int:
        """How many there are now."""
        return len(self._registrations)

    def metadata(self, registrations: Sequence[Registration]) -> bytes:
        """What peers need for these, for `unpacked` and `hold`. It stays good when more is registered."""
        assert registrations
        try:
            pieces = [
                self._agent.getLocalPartialMD(one.descriptors, number == 0, [self._backend])
                for number, one in enumerate(registrations)
            ]
        except Exception as error:
            raise translated(error, "describing our memory") from error
        return packed(self.name, pieces)

    # --- peers --------------------------------------------------------------------------------------------------------

    def hold(self, connection: Connection) -> None:
        """Know this peer and this memory of it, in addition to what was known, and keep it so until `let_go`. Takes some 20 ms
        the first time.

        Raises:
            NixlError: it cannot be connected, `PeerDead` or `BadMetadata` as a rule; then it is not held.
        """
        name = connection.agent
        if name == self.name:
            return
        with self._lock:
            peer = self._peers.get(name)
            if peer is None:
                peer = self._peers[name] = _Peer()
            peer.users += 1
            if connection.digest in peer.known:
                return
        try:
            with self._connecting:
                for piece in connection.pieces:
                    if piece not in peer.pieces:
                        self._load(name, piece)
                        peer.pieces.add(piece)
                peer.known.add(connection.digest)
        except NixlError:
            self.disconnect(name)
            self.let_go(name)
            raise

    def _load(self, name: str, piece: bytes) -> None:
        try:
            found = self._agent.loadRemoteMD(piece)
        except Exception as error:
            raise translated(error, f"connecting to agent {name}") from error
        if found not in (name, name.encode()):
            raise BadMetadata(f"the metadata said to be of agent {name} is of {found!r}; it must be described afresh")

    def disconnect(self, name: str) -> None:
        """Forget the peer, now or when its last user lets it go. Unknown: nothing."""
        with self._lock:
            peer = self._peers.get(name)
            if peer is not None:
                peer.leaving = True
                self._leave(name, peer)

    def hold_again(self, name: str) -> None:
        """Once more, by somebody who holds it."""
        if name != self.name:
            with self._lock:
                self._peers[name].users += 1

    def let_go(self, name: str) -> None:
        if name == self.name:
            return
        with self._lock:
            peer = self._peers[name]
            peer.users -= 1
            if peer.leaving:
                self._leave(name, peer)

    def _leave(self, name: str, peer: _Peer) -> None:
        """Locked."""
        if peer.users:
            return
        del self._peers[name]
        for prepared in peer.lists:
            self._agent.releasedDlistH(prepared)
        self._quietly(self._agent.invalidateRemoteMD, name)

    @property
    def peers(self) -> int:
        return len(self._peers)

    # --- transfers ----------------------------------------------------------------------------------------------------

    def prepare_local(self, rows: U64, kind: str) -> int:
        """A list of our ranges, to be chosen from by index. rows: uint64 [n, 5]: address, length, device, stride, count.
        Released with `release_list`. Raises NixlError."""
        return self._prepare(self._nixl.NIXL_INIT_AGENT, rows, kind)

    def prepare_remote(self, peer: str, rows: U64, kind: str) -> int:
        """As `prepare_local`, of a connected peer's memory; released when the peer is disconnected."""
        prepared = self._prepare(peer, rows, kind)
        with self._lock:
            if peer in self._peers:
                self._peers[peer].lists.append(prepared)
        return prepared

    def _prepare(self, agent: str, rows: U64, kind: str) -> int:
        assert rows.dtype == np.uint64 and rows.ndim == 2 and rows.shape[1] == 5
        try:
            prepared: int = self._agent.prepXferDlist(agent, self._segments[kind], rows, [self._backend])
        except Exception as error:
            raise translated(error, "preparing ranges") from error
        return prepared

    def release_list(self, prepared: int) -> None:
        self._quietly(self._agent.releasedDlistH, prepared)

    def request(self, peer: str, local: U64, remote: U64, kinds: tuple[str, str] = (DRAM, DRAM), write: bool = False) -> int:
        """A transfer between ranges of ours and of a peer, not begun. local, remote: uint64 [n, 3]: address, length, device.

        Raises:
            NotRegistered: some of it is out of what is registered. Other NixlErrors.
        """
        try:
            ours = self._nixl.nixlXferDList(self._segments[kinds[0]], local)
            theirs = self._nixl.nixlXferDList(self._segments[kinds[1]], remote)
            handle: int = self._agent.createXferReq(self._operations[write], ours, theirs, peer, b"", [])
        except Exception as error:
            raise translated(error, f"a transfer of {len(local)} ranges") from error
        return handle

    def request_prepared(
        self, local: int, local_indices: I32 | list[int], remote: int, remote_indices: I32 | list[int], write: bool = False
    ) -> int:
        """As `request`, of ranges chosen from prepared lists; neighbours become one."""
        try:
            operation = self._operations[write]
            handle: int = self._agent.makeXferReq(operation, local, local_indices, remote, remote_indices, b"", [], False)
        except Exception as error:
            raise translated(error, "a transfer of prepared ranges") from error
        return handle

    def post(self, handle: int, notification: bytes = b"") -> bool:
        """Begin a transfer; True: it is over already. ``notification`` reaches the peer after the bytes. Raises NixlError."""
        try:
            return bool(self._post(handle, notification) == self._success)
        except Exception as error:
            raise translated(error, "beginning a transfer") from error

    def done(self, handle: int) -> bool:
        """Is a transfer over? Raises NixlError: it has failed, and is over."""
        try:
            return bool(self._status(handle) == self._success)
        except Exception as error:
            raise translated(error, "a transfer") from error

    def release(self, handle: int) -> None:
        """Forget a transfer. No fence: one that is not over goes on writing."""
        try:
            self._agent.releaseXferReq(handle)
        except Exception as error:
            self._expected(error)

    # --- notifications ------------------------------------------------------------------------------------------------

    def notify(self, peer: str, message: bytes) -> None:
        """Send a message to a connected peer. Raises NixlError."""
        try:
            self._agent.genNotif(peer, message)
        except Exception as error:
            raise translated(error, f"a message to agent {peer}") from error

    def notifications(self) -> dict[str, list[bytes]]:
        """Messages that have arrived since the last call, by sender's agent."""
        try:
            found: dict[str, list[bytes]] = self._agent.getNotifs({}, [])
        except Exception as error:
            raise translated(error, "asking for messages") from error
        return found

    # --- the end ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End it: from here on nothing of it writes to memory. All requests have been released."""
        del self._post, self._status, self._agent

    def _quietly(self, call: Callable[..., Any], *arguments: Any) -> None:
        """What ends something may find it ended."""
        try:
            call(*arguments)
        except Exception as error:
            self._expected(error)

    @staticmethod
    def _expected(error: Exception) -> None:
        if type(error).__name__ not in KINDS:
            raise error
