"""How long a purge of 100,000 blocks takes: three real nodes and a directory, three tiers, each of which holds all of them.

Each node holds a third of the blocks of 4 KiB in its arena and on its disk; the object store (a folder) holds all. As many
blocks of another tenant lie beside them and must stay. Measured from the question of a session to its answer, median of the
rounds; after each, every file is searched for what every purged block begins with, and every key is looked for.

Nodes and directory share this process, and with it one interpreter lock: as processes of their own they are no slower.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import arguments, progress, report

from kvshare import keys
from kvshare.config import Settings
from kvshare.directory_server import DirectoryServer
from kvshare.keys import Namespace
from kvshare.messages import Purge, Purged
from kvshare.mover import Mover
from kvshare.node import Node
from kvshare.purge import PurgeScope
from kvshare.session import Session, call
from kvshare.transport.base import Targets

NODES = 3
BLOCKS = 100_000
BLOCK_BYTES = 4096
BATCH = 4096
ROUNDS = 3
SECRET = "of this benchmark alone"
MARK = b"this block must go"  # what purged blocks begin with
WAIT_SECONDS = 30.0
SECONDS = 300.0  # for what is not measured
SPACE = Namespace(
    weights="purge", dtype="bf16", kv_dtype="bf16", block_size=16, page_bytes=BLOCK_BYTES, layers=1, kv_heads=1, head_size=64,
    hash_algorithm="none", hash_seed="", packing="bench",
)  # fmt: skip


def names(tenant: str, start: int, end: int) -> list[bytes]:
    prefix = keys.prefix(SPACE.family(), tenant=keys.tenant_tag(tenant))
    return [prefix + number.to_bytes(32, "big") for number in range(start, end)]


def fill(node: Node, tenant: str, start: int, end: int, mark: bytes) -> None:
    """Save blocks, each beginning with ``mark`` and its number."""
    session = Session.connect(node.settings, SPACE, engine=f"filler-{tenant}", block_bytes=BLOCK_BYTES, subscribe=False)
    mover = Mover(session)
    wanted = names(tenant, start, end)
    for at in range(0, len(wanted), BATCH):
        some = wanted[at : at + BATCH]
        rows = np.random.default_rng(at).integers(0, 255, (len(some), BLOCK_BYTES), np.uint8)
        rows[:, : len(mark)] = np.frombuffer(mark, np.uint8)
        rows[:, 32:40] = np.arange(start + at, start + at + len(some), dtype=np.uint64).view(np.uint8).reshape(-1, 8)
        job = mover.save(some, Targets.strided(rows.ctypes.data, BLOCK_BYTES, np.arange(len(some)), BLOCK_BYTES))
        assert job.wait(SECONDS) and job.saved == len(some), f"{job.saved} of {len(some)} blocks were saved"
    mover.close()
    session.close()


def keep(node: Node) -> None:
    """All that the arena holds, to disk and object store."""
    wanted = [block.key for store in node.memory.stores.values() for block in store.inventory()]
    asyncio.run_coroutine_threadsafe(node.memory.tiers.keep(wanted, time.monotonic() + SECONDS), node._loop).result(SECONDS)


def tiers_of(nodes: list[Node]) -> dict[str, int]:
    objects = nodes[0].memory.tiers.objects
    assert objects is not None
    nodes[0]._loop.call_soon_threadsafe(objects.refresh)  # as a miss does it
    counters = [node.status().counters for node in nodes]
    return {
        "arena": sum(each["blocks"] for each in counters),
        "disk": sum(each["disk_blocks"] for each in counters),
        "object": counters[0]["object_blocks"],
    }


def waited(question: Callable[[], bool]) -> bool:
    """Until a node has learned what the others have put into the store, for instance."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not question():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def marked(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file() and MARK in path.read_bytes()]


def round_of(folder: Path, blocks: int) -> tuple[float, dict[str, int]]:
    """One purge: its seconds, and the blocks that each tier gave up."""
    server = DirectoryServer(Settings.load({"secret": SECRET}, environ={}))
    server.start()
    nodes: list[Node] = []
    common = {
        "runtime_dir": str(folder / "run"), "shm_dir": str(folder), "secret": SECRET, "directory": server.endpoint,
        "autostart": False, "transports": "tcp", "arena_bytes": "512MiB", "disk_bytes": "512MiB", "warm_bytes": 0,
        "object_url": f"file://{folder / 'bucket'}", "save_bytes_max": "1GiB",
    }  # fmt: skip
    try:
        for number in range(NODES):
            own = {"node_name": f"node{number}", "disk_dir": str(folder / f"disk{number}")}
            nodes.append(Node(Settings.load({**common, **own}, environ={})))
            nodes[-1].start()
            start, end = (blocks * part // NODES for part in (number, number + 1))
            fill(nodes[-1], "goes", start, end, MARK)
            fill(nodes[-1], "stays", start, end, b"this block must stay")
            keep(nodes[-1])
        full = dict.fromkeys(("arena", "disk", "object"), 2 * blocks)
        assert waited(lambda: tiers_of(nodes) == full), f"{tiers_of(nodes)} are held, {full} should be"
        progress(f"filled: {full}")
        began = time.perf_counter()
        answer = call(nodes[0].settings, lambda ask: Purge(ask, PurgeScope("goes"), False), SECONDS)
        seconds = time.perf_counter() - began
        assert isinstance(answer, Purged) and not answer.silent, answer
        assert not [fault for node in answer.nodes for fault in node.faults], answer
        gone = dict.fromkeys(full, 0)
        for node in answer.nodes:
            for tier in node.tiers:
                gone[tier.tier] += tier.blocks
        assert set(gone.values()) == {blocks}, f"{gone} blocks went, {blocks} each should have"
        assert marked(folder) == [], "bytes of purged blocks are left"
        assert tiers_of(nodes) == dict.fromkeys(gone, blocks), "what should have stayed did not"
        assert server.status().keys == blocks, "the directory knows of purged blocks"
        wanted = set(names("goes", 0, blocks))
        slow = [tier for node in nodes for tier in (node.memory.tiers.disk, node.memory.tiers.objects)]
        assert not [tier for tier in slow if tier is None or any(map(tier.length, wanted))], "purged blocks are found"
        assert not [block for node in nodes for block in node.memory.inventory() if block.key in wanted]
        return seconds, gone
    finally:
        for node in nodes:
            node.stop()
        server.stop()


def main() -> None:
    options = arguments(__doc__ or "")
    blocks, rounds = (10_000, 1) if options.quick else (BLOCKS, ROUNDS)
    taken = []
    for number in range(rounds):
        with tempfile.TemporaryDirectory(prefix="kvshare-purge-") as folder:
            seconds, gone = round_of(Path(folder), blocks)
        progress(f"round {number + 1}: {seconds:.3f} s for {gone}")
        taken.append(seconds)
    figure = {"purge_100k_seconds": (statistics.median(taken), "s")}
    report(figure, {"blocks": blocks, "nodes": NODES, "block_bytes": BLOCK_BYTES, "seconds": taken}, options.json)


if __name__ == "__main__":
    main()
