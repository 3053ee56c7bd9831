"""Connecting the two halves of an engine to the node of its host. What cannot be shared, or finds no node, runs without."""

from __future__ import annotations

import logging
import multiprocessing
import os
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING

from msgspec.structs import replace

from kvshare import processes
from kvshare.config import LEAVE_SHARE, Settings
from kvshare.device import STRIDE, DeviceTable, table_path
from kvshare.errors import NamespaceError, RegionError, TransportError, Unavailable
from kvshare.integrations.vllm.identity import namespaces_of
from kvshare.integrations.vllm.layout import Layout
from kvshare.integrations.vllm.live import Exposure, LiveCache
from kvshare.integrations.vllm.lookup import ShardedLookup
from kvshare.integrations.vllm.metadata import Hello
from kvshare.integrations.vllm.pages import Cuda, DevicePages, HostPages, Pages
from kvshare.integrations.vllm.scheduler_half import SchedulerHalf
from kvshare.integrations.vllm.sharding import ShardedPages, Shards, shards_of
from kvshare.integrations.vllm.support import unserved_reason
from kvshare.integrations.vllm.worker_half import WorkerHalf
from kvshare.messages import Expose
from kvshare.mover import Mover
from kvshare.places import ProcessMemory
from kvshare.session import Session
from kvshare.transport.choose import Transports

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

log = logging.getLogger("kvshare")

UNSHARED = "kvshare: this engine runs unshared: %s"


def attach_worker(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    kv_caches: Mapping[str, torch.Tensor],
    settings: Settings,
    weights: str,
) -> tuple[WorkerHalf, Hello] | None:
    """Connect a worker whose KV cache has been allocated, and what it tells its scheduler. None: unshared, and said why.

    Waits for the node, at most ``settings.attach_seconds``.
    """
    first = vllm_config.parallel_config.rank == 0  # of several workers one speaks
    reason = unserved_reason(vllm_config, kv_cache_config)
    if reason:
        if first:
            log.warning(UNSHARED, reason)
        return None
    try:
        shards = shards_of(vllm_config, kv_cache_config, settings.head_shards)
        layouts = _layouts(kv_caches, kv_cache_config, vllm_config, shards)
        layout = layouts[0]
        if layout.device not in ("cpu", "cuda"):
            raise NamespaceError(f"memory of a {layout.device} device is not served yet")
        namespaces = namespaces_of(vllm_config, kv_cache_config, layout, weights, shards.count)
        session = Session.connect(
            settings,
            namespaces[shards.own.start],
            engine=_name(vllm_config),
            block_bytes=layout.block_bytes,
            subscribe=False,
            warm=False,
        )
    except NamespaceError as error:
        log.error(UNSHARED, error)
        return None
    except Unavailable as error:
        log.warning(UNSHARED, error)
        return None
    mover = Mover(session, affinity=free_processors())
    offers, table = _offers(mover.transports, settings, layouts, shards, kv_cache_config.num_blocks, first)
    parts: list[Pages]
    if layout.device == "cpu":
        parts = [HostPages(part, mover) for part in layouts]
    else:
        device = Cuda(next(iter(kv_caches.values())).device)
        direct = _direct(mover.transports, layouts, kv_cache_config.num_blocks) if offers else None
        parts = [DevicePages(part, kv_caches, mover, device, direct) for part in layouts]
    pages = ShardedPages(shards, parts, [namespace.family() for namespace in namespaces])

    def close() -> None:
        if table is not None:
            table.retire_all()  # the blocks are about to be freed
            table.unlink()
        mover.close()
        session.close()

    if first:
        log.info("kvshare: shares blocks of %d bytes as %s", layout.block_bytes, namespaces[0].family().hex())
    leave_seconds = settings.drain_seconds * LEAVE_SHARE
    return WorkerHalf(pages, mover.measured, close, leave_seconds), Hello(namespaces, layout.block_bytes, offers)


def _layouts(
    kv_caches: Mapping[str, torch.Tensor], kv_cache_config: KVCacheConfig, vllm_config: VllmConfig, shards: Shards
) -> list[Layout]:
    """One for each shard of this rank."""
    if len(shards.own) == 1:
        return [Layout.of(kv_caches, kv_cache_config, vllm_config)]
    heads = kv_cache_config.kv_cache_groups[0].kv_cache_spec.num_kv_heads
    return [Layout.of(kv_caches, kv_cache_config, vllm_config, shards.heads(shard, heads)) for shard in shards.own]


def _offers(
    transports: Transports, settings: Settings, layouts: list[Layout], shards: Shards, blocks: int, first: bool
) -> tuple[dict[int, Expose], DeviceTable | None]:
    """How peers find each shard of the rank's blocks, if they can read them at all. The first rank makes the table of all."""
    memories = {}
    table = None
    try:
        if first:
            table = DeviceTable.create(table_path(settings.arena_stem), blocks, layouts[0].block_bytes)
        for shard, layout in zip(shards.own, layouts, strict=True):
            memory = transports.expose(_memory(layout, table), blocks, table)
            if memory is not None:
                memories[shard] = memory
    except (RegionError, TransportError) as error:
        log.warning("kvshare: peers cannot read this engine's own cache: %s", error)
        memories = {}
    if table is not None and not memories:
        table.unlink()
        table = None
    path = "" if table is None else table.path
    offers = {
        shard: Expose(secrets.randbits(62), path, blocks, layouts[0].block_bytes, memory) for shard, memory in memories.items()
    }
    return offers, table


def _direct(transports: Transports, layouts: list[Layout], blocks: int) -> Transports | None:
    """Have peers' blocks land in these pages of GPU memory, which peers can read; None, and said why, where they cannot."""
    try:
        for layout in layouts:
            transports.register_targets(_memory(layout, None), blocks)
    except TransportError as error:
        log.warning("kvshare: blocks of other GPUs take the way through host memory: %s", error)
        return None
    return transports


def _memory(layout: Layout, table: DeviceTable | None) -> ProcessMemory:
    processes.allow_reading()
    pid = os.getpid()
    kind = "DRAM" if layout.device == "cpu" else "VRAM"
    bases, strides, lengths = (tuple(column.tolist()) for column in (layout.bases, layout.strides, layout.page_bytes))
    pages = bases, strides, lengths, 0 if table is None else table.table_address, STRIDE
    return ProcessMemory(pid, processes.started(pid), processes.pid_space(), kind, layout.device_index, *pages)


def attach_scheduler(vllm_config: VllmConfig, settings: Settings, hellos: list[Hello]) -> SchedulerHalf | None:
    """Connect a scheduler all of whose workers are attached, and have its node fetch what is hot."""
    hello = hellos[0]
    sessions: list[Session] = []
    try:
        for namespace in hello.namespaces:
            sessions.append(
                Session.connect(
                    settings,
                    namespace,
                    engine=_name(vllm_config),
                    block_bytes=hello.block_bytes,
                    subscribe=True,
                    warm=True,
                )
            )
    except (NamespaceError, Unavailable) as error:
        log.warning(UNSHARED, error)
        for session in sessions:
            session.close()
        return None
    for notice in dict.fromkeys(notice for session in sessions for notice in session.notices):
        log.warning("kvshare: %s", notice)
    role = vllm_config.kv_transfer_config
    families = [namespace.family() for namespace in hello.namespaces]
    return SchedulerHalf(
        sessions[0] if len(sessions) == 1 else ShardedLookup(sessions, families),
        hello.namespaces[0],
        hello.block_bytes * len(sessions),
        settings.load_bytes_max,
        loads=role.is_kv_consumer,
        saves=role.is_kv_producer,
        live=_live(hellos, sessions) if role.is_kv_producer else None,
        tenant=settings.tenant,
    )


def _live(hellos: list[Hello], sessions: list[Session]) -> LiveCache | None:
    """The engine's cache for peers, each shard from the first rank that has it."""
    offers: dict[int, Expose] = {}
    for hello in hellos:
        for shard, offer in hello.offers.items():
            offers.setdefault(shard, offer)
    path = next((offer.table_path for offer in hellos[0].offers.values()), "")
    if not path:
        return None
    table = DeviceTable.open(path, writable=True)
    exposures = [
        Exposure(replace(offer, table_path=path, slots=table.slots), sessions[shard], hellos[0].namespaces[shard].family())
        for shard, offer in sorted(offers.items())
    ]
    live = LiveCache(table, exposures)
    for shard in offers:
        sessions[shard].on_withdraw = live.withdraw
    return live


def free_processors() -> set[int]:
    """Processors that this process may use, whatever its engine has pinned the calling thread to: those of all its threads,
    and of the engine's main process if it was started by one."""
    threads = [int(name) for name in os.listdir("/proc/self/task")]
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        threads.append(parent.pid)
    processors: set[int] = set()
    for thread in threads:
        try:
            processors |= os.sched_getaffinity(thread)
        except OSError:
            continue  # it has just ended
    return processors


def _name(vllm_config: VllmConfig) -> str:
    return f"vllm-{vllm_config.kv_transfer_config.engine_id}"
