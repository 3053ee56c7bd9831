"""Connecting the two halves of an engine to the node of its host. What cannot be shared, or finds no node, runs without."""

from __future__ import annotations

import logging
import multiprocessing
import os
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING

from kvshare import processes
from kvshare.config import Settings
from kvshare.device import STRIDE, DeviceTable
from kvshare.errors import NamespaceError, RegionError, Unavailable
from kvshare.integrations.vllm.identity import namespace_of
from kvshare.integrations.vllm.layout import Layout
from kvshare.integrations.vllm.live import LiveCache
from kvshare.integrations.vllm.metadata import Hello
from kvshare.integrations.vllm.pages import Cuda, DevicePages, HostPages, Pages
from kvshare.integrations.vllm.scheduler_half import SchedulerHalf
from kvshare.integrations.vllm.support import unserved_reason
from kvshare.integrations.vllm.worker_half import WorkerHalf
from kvshare.messages import Expose
from kvshare.mover import Mover
from kvshare.places import ProcessMemory
from kvshare.session import Session

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
        layout = Layout.of(kv_caches, kv_cache_config, vllm_config)
        if layout.device not in ("cpu", "cuda"):
            raise NamespaceError(f"memory of a {layout.device} device is not served yet")
        namespace = namespace_of(vllm_config, kv_cache_config, layout, weights)
        session = Session.connect(
            settings, namespace, engine=_name(vllm_config), block_bytes=layout.block_bytes, subscribe=False, warm=False
        )
    except NamespaceError as error:
        log.error(UNSHARED, error)
        return None
    except Unavailable as error:
        log.warning(UNSHARED, error)
        return None
    mover = Mover(session, affinity=free_processors())
    pages: Pages = HostPages(layout, mover)
    if layout.device == "cuda":
        pages = DevicePages(layout, kv_caches, mover, Cuda(next(iter(kv_caches.values())).device))

    table = _device_table(settings, layout, kv_cache_config.num_blocks)

    def close() -> None:
        if table is not None:
            table.retire_all()  # the blocks are about to be freed
            table.unlink()
        mover.close()
        session.close()

    log.info("kvshare: shares blocks of %d bytes as %s", layout.block_bytes, namespace.family().hex())
    return WorkerHalf(pages, close), Hello(namespace, layout.block_bytes, _offer(layout, table))


def _device_table(settings: Settings, layout: Layout, blocks: int) -> DeviceTable | None:
    """Generations of the engine's blocks; None, and said why, where peers will not read them."""
    if layout.device != "cpu":
        return None
    try:
        return DeviceTable.create(f"{settings.arena_stem}-device-{os.getpid()}.table", blocks, layout.block_bytes)
    except RegionError as error:
        log.warning("kvshare: peers cannot read this engine's own cache: %s", error)
        return None


def _offer(layout: Layout, table: DeviceTable | None) -> Expose | None:
    """How peers find the engine's blocks."""
    if table is None:
        return None
    pid = os.getpid()
    bases, strides, lengths = (tuple(column.tolist()) for column in (layout.bases, layout.strides, layout.page_bytes))
    memory = ProcessMemory(
        pid, processes.started(pid), processes.pid_space(), "DRAM", 0, bases, strides, lengths, table.table_address, STRIDE
    )
    return Expose(secrets.randbits(62), table.path, table.slots, table.slot_bytes, memory)


def attach_scheduler(vllm_config: VllmConfig, settings: Settings, hello: Hello) -> SchedulerHalf | None:
    """Connect a scheduler whose worker is attached, and have its node fetch what is hot."""
    assert hello.namespace is not None
    try:
        session = Session.connect(
            settings,
            hello.namespace,
            engine=_name(vllm_config),
            block_bytes=hello.block_bytes,
            subscribe=True,
            warm=True,
        )
    except (NamespaceError, Unavailable) as error:
        log.warning(UNSHARED, error)
        return None
    for notice in session.notices:
        log.warning("kvshare: %s", notice)
    role = vllm_config.kv_transfer_config
    live = None
    if hello.offer is not None and role.is_kv_producer:
        live = LiveCache(DeviceTable.open(hello.offer.table_path, writable=True), hello.offer, session)
    return SchedulerHalf(
        session,
        hello.namespace,
        hello.block_bytes,
        settings.load_bytes_max,
        loads=role.is_kv_consumer,
        saves=role.is_kv_producer,
        live=live,
    )


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
