"""Reads of another process's memory on the same host: an engine's KV cache, which no file holds, or a node's region.

    a portion: alive? ── generations, admit ── process_vm_readv ── generations again ── alive? ── judge

The kernel copies; the owner takes no part, and may be stopped meanwhile. It names its memory by addresses (`ProcessMemory`),
which mean nothing once its process is gone and another has its pid: so a process is held by a pidfd, opened once and compared
with the start that was told, and a portion counts when that process lived before and after it.

Generations of a device region come from its table's file, mapped here, or where it has none from the owner's memory; a block
is OK when they are the expected ones before and after its bytes came. Those of a host region come with checksums and lengths
from its header table in the owner's memory, and blocks are verified as everywhere.

When is a region no longer served? A table with a file: when the file is gone. A host region: when its owner said so in a word
of the table's first page (`register`, `deregister`), or has that memory no longer mapped.

Threads: as `kvshare.transport.portions`. A process and its tables are let go with the last read that uses them.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from kvshare import native, processes
from kvshare.device import DeviceTable
from kvshare.errors import TransportError
from kvshare.places import DEVICE, ProcessMemory
from kvshare.region import FORMAT_VERSION, HEADER, MAGIC, SUPERBLOCK, SUPERBLOCK_BYTES
from kvshare.transport import ranges
from kvshare.transport.base import I64, U64, BlockStatus, ReadRequest
from kvshare.transport.mapped import verify_again, wanted_of
from kvshare.transport.portions import U8, PortionTransport

if TYPE_CHECKING:
    from kvshare.places import RegionDescription
    from kvshare.slots import Region

log = logging.getLogger("kvshare")

# The last word of a host table's first page, which its format leaves free: 1 while the owner serves the region from memory.
_SERVED_OFFSET = SUPERBLOCK_BYTES - 8
_FIRST_PAGE = np.dtype([("superblock", SUPERBLOCK), ("unused", f"V{_SERVED_OFFSET - SUPERBLOCK.itemsize}"), ("served", "<u8")])


def memory_of_region(region: Region) -> ProcessMemory:
    """Where a host region that is mapped in this process lies in it."""
    pid = os.getpid()
    slot_bytes = (region.slot_bytes,)
    places = (region.data_address,), slot_bytes, slot_bytes, region.table_address, HEADER.itemsize
    return ProcessMemory(pid, processes.started(pid), processes.pid_space(), "DRAM", 0, *places)


class _Gone(TransportError):
    """The process has ended."""


class _Refused(TransportError):
    """The system does not let us read that process."""


class _Peer:
    """A process that was alive when this was made, and is the one that was meant.

    Raises:
        OSError: there is none of that pid. TransportError: it is another.
    """

    def __init__(self, pid: int, started: int) -> None:
        self.pid = pid
        self._fd = os.pidfd_open(pid)
        weakref.finalize(self, os.close, self._fd)
        if processes.started(pid) != started:  # asked once the pidfd holds whoever it is
            raise TransportError(f"process {pid} is not the one that was described: that one has ended")
        self.tables: dict[str, tuple[DeviceTable, tuple[int, int]]] = {}  # by path, with the file's device and inode

    def alive(self) -> bool:
        poll = select.poll()  # one object polls in one thread
        poll.register(self._fd, select.POLLIN)
        return not poll.poll(0)

    def copy(self, copies: ranges.Spans) -> None:
        """Copy these ranges of its memory.

        Raises:
            TransportError: they cannot be had; `_Gone` and `_Refused` say why.
        """
        try:
            native.read_process(self.pid, *copies)
        except ProcessLookupError as error:
            raise _Gone(f"process {self.pid} has ended") from error
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOSYS):
                raise TransportError(f"the memory of process {self.pid} is not where it was described: {error}") from error
            raise _Refused(
                f"the system does not let us read the memory of process {self.pid} ({error}): run both as the same user, and "
                "where kernel.yama.ptrace_scope is 1 or more set it to 0 or let the owner call prctl(PR_SET_PTRACER)"
            ) from error

    def fetch(self, address: int, stride: int, slots: I64, out: npt.NDArray[Any]) -> None:
        """Fill ``out`` [n] with what lies at ``address + stride * slots[i]``. Errors as `copy`."""
        targets = ranges.page_addresses([native.address_of(out)], [out.itemsize], np.arange(len(out)))
        sources = ranges.page_addresses([address], [stride], slots)
        self.copy(ranges.Spans(targets.reshape(-1), sources.reshape(-1), np.full(len(out), out.itemsize, np.uint64)))


class _Heads(NamedTuple):
    """What a table says of slots: [n] each; checksums of a device region say nothing."""

    generations: U64
    checksums: U64
    lengths: U64


class _Table(NamedTuple):
    slots: int  # how many it has
    load: Callable[[I64], _Heads]  # of slots that it has, after all that this thread read before


class ProcessTransport(PortionTransport):
    """Reads regions whose description has the ``memory`` of a process that this one may read. Serves by doing nothing but
    saying so."""

    name: ClassVar[str] = "process"

    def __init__(self, threads: int = 2) -> None:
        super().__init__(threads)
        self._pid_space = processes.pid_space()
        self._peers: dict[tuple[str, int, int], _Peer] = {}  # by node, pid and start
        self._refused: set[tuple[str, int, int]] = set()
        self._lock = threading.Lock()

    def register(self, region: Region) -> None:
        """Serve a region of which this process is the owner: it writes to its table."""
        self._say_served(region, True)

    def deregister(self, region: Region) -> None:
        self._say_served(region, False)

    def reaches(self, description: RegionDescription) -> bool:
        """No longer, once the system has refused that process's memory to us: another transport may do."""
        memory = description.memory
        if memory is None or memory.kind != "DRAM" or memory.pid <= 0 or memory.pid_space != self._pid_space:
            return False
        return (description.node, memory.pid, memory.started) not in self._refused

    def read_portion(self, description: RegionDescription, request: ReadRequest, statuses: U8, start: int, stop: int) -> int:
        memory = description.memory
        if memory is None:
            raise TransportError(f"node {description.node!r} does not say where region {description.region} lies in memory")
        wanted = wanted_of(request, statuses, start, stop)
        key = (description.node, memory.pid, memory.started)
        try:
            peer = self._peer_of(key)
            table = self._table_of(peer, description, memory)
            _copy_held(peer, table, memory, request.slots[start:stop], wanted)
            if not peer.alive():
                raise _Gone(f"process {memory.pid} has ended")
        except _Gone:
            self._drop(key)
            raise
        except _Refused as error:
            self._refuse(key, str(error))
            raise
        if description.kind == DEVICE:
            return int(np.count_nonzero(wanted.statuses == BlockStatus.OK))
        return verify_again(wanted, self.tamper)

    def forget(self, node: str) -> None:
        """Drop its processes and their tables; running reads keep theirs to their end."""
        with self._lock:
            self._peers = {key: peer for key, peer in self._peers.items() if key[0] != node}
            self._refused = {key for key in self._refused if key[0] != node}

    def close(self) -> None:
        super().close()
        with self._lock:
            self._peers.clear()

    # --- processes ----------------------------------------------------------------------------------------------------

    def _peer_of(self, key: tuple[str, int, int]) -> _Peer:
        """The process, alive now. Raises OSError or TransportError: it is not there."""
        with self._lock:
            peer = self._peers.get(key)
            if peer is None:
                # Engines come and go on one node: those that are gone are not kept for ever.
                self._peers = {other: kept for other, kept in self._peers.items() if kept.alive()}
                peer = self._peers[key] = _Peer(*key[1:])
        if not peer.alive():
            raise _Gone(f"process {peer.pid} has ended")
        return peer

    def _drop(self, key: tuple[str, int, int]) -> None:
        with self._lock:
            self._peers.pop(key, None)

    def _refuse(self, key: tuple[str, int, int], reason: str) -> None:
        with self._lock:
            first = key not in self._refused
            self._refused.add(key)
        if first:
            log.warning("kvshare: %s", reason)

    # --- tables -------------------------------------------------------------------------------------------------------

    def _table_of(self, peer: _Peer, description: RegionDescription, memory: ProcessMemory) -> _Table:
        """Raises OSError or KVShareError: there is none (any more)."""
        if description.kind != DEVICE:
            return _header_table(peer, description, memory)
        block_bytes = np.uint64(sum(memory.page_bytes))

        def heads(generations: U64) -> _Heads:
            return _Heads(generations, np.zeros_like(generations), np.full_like(generations, block_bytes))

        if description.table_path:
            mapped = self._mapped(peer, description.table_path)
            return _Table(min(mapped.slots, description.slots), lambda slots: heads(mapped.generations(slots)))
        if memory.table_address == 0:
            raise TransportError(f"region {description.region} of node {description.node!r} has no table that we can read")

        def load(slots: I64) -> _Heads:
            generations = np.empty(len(slots), np.uint64)
            peer.fetch(memory.table_address, memory.table_stride, slots, generations)
            return heads(generations)

        return _Table(description.slots, load)

    def _mapped(self, peer: _Peer, path: str) -> DeviceTable:
        """The mapping of a table's file; another one when another file has taken the path."""
        status = os.stat(path)
        file = (status.st_dev, status.st_ino)
        with self._lock:
            known = peer.tables.get(path)
            if known is None or known[1] != file:
                known = peer.tables[path] = (DeviceTable.open(path), file)
        return known[0]

    def _say_served(self, region: Region, served: bool) -> None:
        assert region.headers.flags.writeable  # else it is another's
        native.store_generation(region.table_address - SUPERBLOCK_BYTES + _SERVED_OFFSET, int(served))


def _header_table(peer: _Peer, description: RegionDescription, memory: ProcessMemory) -> _Table:
    """The header table of a host region, found to be this one and served."""
    page = np.zeros(1, _FIRST_PAGE)
    peer.fetch(memory.table_address - SUPERBLOCK_BYTES, 0, np.zeros(1, np.int64), page)
    found, served = page["superblock"][0], int(page["served"][0])
    ours = (MAGIC, FORMAT_VERSION, HEADER.itemsize, description.slot_bytes)
    if served != 1 or tuple(found[name] for name in ("magic", "version", "header_bytes", "slot_bytes")) != ours:
        raise TransportError(f"node {description.node!r} serves no region {description.region} from its memory")

    def load(slots: I64) -> _Heads:
        heads = np.empty(len(slots), HEADER)
        peer.fetch(memory.table_address, memory.table_stride, slots, heads)
        return _Heads(heads["generation"], heads["checksum"], heads["length"].astype(np.uint64))

    return _Table(int(found["available_slots"]), load)


def _copy_held(peer: _Peer, table: _Table, memory: ProcessMemory, slots: I64, wanted: native.Wanted) -> None:
    """Copy the blocks that are there at their expected generation; those of which that is still true afterwards are OK, before
    their checksums are compared, all others stale."""
    expected = wanted.expected
    wanted.statuses[:] = BlockStatus.STALE
    possible = (slots >= 0) & (slots < table.slots) & (expected % np.uint64(2) == 0) & (expected != 0)
    chosen = np.flatnonzero(possible)
    heads = table.load(slots[chosen])
    held = (heads.generations == expected[chosen]) & (heads.lengths == wanted.page_bytes.sum())
    wanted.checksums[chosen] = heads.checksums
    chosen = chosen[held]
    if not len(chosen):
        return
    sources = ranges.page_addresses(memory.bases, memory.strides, slots[chosen])
    source_bytes = np.asarray(memory.page_bytes, np.uint64)
    # Not coalesced: neighbours on either side are one range to the native call.
    peer.copy(ranges.spans(wanted.targets[chosen], wanted.page_bytes, sources, source_bytes))
    after = table.load(slots[chosen]).generations
    wanted.statuses[chosen[after == expected[chosen]]] = BlockStatus.OK
