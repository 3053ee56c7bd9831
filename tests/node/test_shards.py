"""A directory of several shards. Goal: it serves as one does, a shard that is lost or silent costs the keys that belong to it
and no waiting, and all of it is found again when it is back; what differs is repaired, and many that start at once come one
by one. Method: real servers, nodes and sessions on this machine; bytes are compared."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from kvshare import keys, link, wire
from kvshare.cluster_messages import Resync, Welcome
from kvshare.config import Settings
from kvshare.directory_server import DirectoryServer
from kvshare.errors import ProtocolError
from kvshare.fingerprints import ALL_PARTS, index_seed, shard_of
from kvshare.inventories import INVENTORIES_MAX
from kvshare.link import Member
from kvshare.messages import Missed
from kvshare.outbox import PUBLISH_BLOCKS_MAX
from kvshare.places import HOST, NodeDescription, RegionDescription, Stored
from kvshare.purge import PurgeScope
from kvshare.runs import keys_of
from kvshare.shards import Shards
from tests.node.conftest import BLOCK_SIZE, SECRET, SPACE, Cluster, Host, blocks_of, eventually

COUNT = 40
TOKENS = list(range(100, 100 + COUNT * BLOCK_SIZE))


def chain(tokens: list[int] = TOKENS) -> list[bytes]:
    return [keys.prefix(SPACE.family()) + block for block in keys.chain(tokens, BLOCK_SIZE)]


def owners(shards: int, tokens: list[int] = TOKENS) -> list[int]:
    """The shard that each block of a prompt belongs to."""
    numbers: list[int] = shard_of(keys_of(chain(tokens)), index_seed(SECRET), shards).tolist()
    return numbers


def loaded(cache, tokens: list[int] = TOKENS) -> int:
    """Blocks loaded; what was loaded has the right bytes."""
    blocks = blocks_of(tokens)
    filled = np.zeros_like(blocks)
    count = cache.load(tokens, filled) // BLOCK_SIZE
    assert (filled[:count] == blocks[:count]).all()
    return count


def matched(cache, tokens: list[int] = TOKENS) -> int:
    return cache.match(tokens) // BLOCK_SIZE


def counted(host: Host, name: str) -> int:
    assert host.node is not None
    return host.node.status().counters[name]


def test_a_prompt_that_is_scattered_over_shards_is_found_and_pulled(cluster: Cluster) -> None:
    shards = cluster.start_shards(3)
    a, b = cluster.host("a").start(), cluster.host("b", warm_bytes=0).start()
    with a.connect() as giver, b.connect() as taker:
        giver.save(TOKENS, blocks_of(TOKENS))
        assert eventually(lambda: matched(taker) == COUNT)
        assert [shard.status().keys for shard in shards] == [owners(3).count(number) for number in range(3)]
        assert loaded(taker) == COUNT


def test_an_engine_that_joins_is_warmed_by_the_plans_of_all_shards(cluster: Cluster) -> None:
    shards = cluster.start_shards(3)
    a, b = cluster.host("a").start(), cluster.host("b").start()
    with a.connect() as giver:
        giver.save(TOKENS, blocks_of(TOKENS))
        for _ in range(3):
            assert matched(giver) == COUNT
        assert eventually(lambda: sum(shard.status().counters["hot_keys"] for shard in shards) == COUNT)
        with b.connect() as joiner:
            state = joiner.wait_warm(20.0)
            assert (state.done, state.pulled, state.donors) == (True, COUNT, {"a": COUNT})
            assert b.node is not None and {block.key for block in b.node.memory.inventory()} == set(chain())


def test_a_purge_reaches_what_all_shards_know(cluster: Cluster) -> None:
    shards = cluster.start_shards(2)
    a, b = cluster.host("a").start(), cluster.host("b", warm_bytes=0).start()
    with a.connect() as giver, b.connect() as taker:
        giver.save(TOKENS, blocks_of(TOKENS))
        assert eventually(lambda: loaded(taker) == COUNT)
        assert b.node is not None
        done = b.node.purge(PurgeScope("", SPACE.family(), b""))
        assert done.silent == [] and sorted(node.node for node in done.nodes) == ["a", "b"]
        assert [shard.status().keys for shard in shards] == [0, 0], "all shards know before the purge is said to be done"
        assert matched(taker) == matched(giver) == 0


def test_what_only_a_leaving_node_has_moves_shard_by_shard(cluster: Cluster) -> None:
    shards = cluster.start_shards(3)
    a, b = cluster.host("a").start(), cluster.host("b", warm_bytes=0).start()
    with a.connect() as giver, b.connect() as taker:
        giver.save(TOKENS, blocks_of(TOKENS))
        assert eventually(lambda: sum(shard.status().keys for shard in shards) == COUNT)
        assert a.node is not None and b.node is not None
        drained = a.node.drain(10.0)
        assert drained is not None and (drained.moved, drained.lost) == (COUNT, 0)
        assert {block.key for block in b.node.memory.inventory()} == set(chain())
        a.stop()
        assert loaded(taker) == COUNT


def test_a_lost_shard_costs_its_keys_until_it_is_back_and_filled_again(cluster: Cluster) -> None:
    shards = cluster.start_shards(3)
    a, b = cluster.host("a").start(), cluster.host("b", warm_bytes=0).start()
    with a.connect() as giver, b.connect() as taker:
        giver.save(TOKENS, blocks_of(TOKENS))
        assert eventually(lambda: matched(taker) == COUNT)
        lost = owners(3)[5]
        shards[lost].stop()
        before = owners(3).index(lost)
        assert eventually(lambda: matched(taker) == before), "a chain ends at the first block that nobody knows"
        assert matched(giver) == COUNT, "the own node needs no directory"
        assert b.node is not None and set(b.node.memory.peers) == {"a"}, "others list the peer"
        more = list(range(9000, 9000 + COUNT * BLOCK_SIZE))
        giver.save(more, blocks_of(more))  # while one shard is away
        cluster.start_shard_again(lost)
        assert eventually(lambda: matched(taker) == matched(taker, more) == COUNT, 20)
        assert loaded(taker) == loaded(taker, more) == COUNT


def test_a_node_that_dies_while_a_shard_is_away_is_forgotten_all_the_same(cluster: Cluster) -> None:
    shards = cluster.start_shards(2)
    a, b = cluster.host("a").spawn(), cluster.host("b", warm_bytes=0).start()
    assert b.node is not None
    peers = b.node.memory.peers
    assert eventually(lambda: "a" in peers)
    shards[1].stop()
    a.kill()
    assert eventually(lambda: "a" not in peers)
    cluster.start_shard_again(1)
    assert eventually(lambda: [node.node for node in cluster.shards[1].status().nodes] == ["b"])
    assert "a" not in peers
    a.spawn()
    assert eventually(lambda: "a" in peers)


@pytest.fixture
def silent_shard() -> Iterator[subprocess.Popen[str]]:
    """Shard 1 of 2 in a process of its own, which can be stopped without closing anything."""
    command = [sys.executable, "-m", "kvshare", "directory", "--shard", "1", "--set", "directory_shards=2"]
    process = subprocess.Popen([*command, "--set", f"secret={SECRET}"], stdout=subprocess.PIPE, text=True, env={**os.environ})
    yield process
    process.send_signal(signal.SIGCONT)
    process.terminate()
    process.wait(20)
    assert process.stdout is not None
    process.stdout.close()


def test_a_silent_shard_costs_one_question_its_patience_and_the_others_nothing(
    cluster: Cluster, silent_shard: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "SILENT_SECONDS", 3600.0)
    assert silent_shard.stdout is not None
    first = DirectoryServer(Settings.load({"secret": SECRET}, {}), 0, 2)
    first.start()
    cluster.shards = [first]
    both = {"directory": f"{first.endpoint},{silent_shard.stdout.readline().strip()}", "lookup_seconds": 2.0}
    a, b = cluster.host("a", **both).start(), cluster.host("b", warm_bytes=0, **both).start()
    with a.connect() as giver, b.connect() as taker:
        giver.save(TOKENS, blocks_of(TOKENS))
        assert eventually(lambda: matched(taker) == COUNT)
        more = list(range(9000, 9000 + COUNT * BLOCK_SIZE))
        giver.save(more, blocks_of(more))
        before = owners(2, more).index(1)
        assert eventually(lambda: first.status().keys == owners(2).count(0) + owners(2, more).count(0))
        silent_shard.send_signal(signal.SIGSTOP)
        assert [matched(taker, more) for _ in range(10)] == [before] * 10, "what the other shard knows is told in time"
        assert counted(b, "directory_silent") == 1, "only one question waited for it"
        silent_shard.send_signal(signal.SIGCONT)
        assert eventually(lambda: matched(taker, more) == COUNT), "it spoke: it is asked again at once"


def test_a_shard_that_lost_something_is_told_it_again(cluster: Cluster) -> None:
    shards = cluster.start_shards(2, heartbeat_seconds=0.5)
    a, b = cluster.host("a", heartbeat_seconds=0.1).start(), cluster.host("b", warm_bytes=0, heartbeat_seconds=0.1).start()
    with a.connect() as giver, b.connect() as taker:
        giver.save(TOKENS, blocks_of(TOKENS))
        assert eventually(lambda: matched(taker) == COUNT)
        known = shards[0].status().keys
        lose(shards[0], chain()[:20])
        assert shards[0].status().keys < known
        assert eventually(lambda: shards[0].status().keys == known)
        assert counted(a, "directory_resyncs") == 3, "two inventories, and the parts that differed"
        assert eventually(lambda: loaded(taker) == COUNT)


def lose(server: DirectoryServer, gone: list[bytes]) -> None:
    """Take these out of its index behind its back, on its loop."""
    done = asyncio.run_coroutine_threadsafe(_lose(server, gone), server._loop)  # type: ignore[arg-type]
    done.result(5.0)


async def _lose(server: DirectoryServer, gone: list[bytes]) -> None:
    server._directory._index.remove("a", keys_of(gone))


def test_a_prompt_that_is_asked_for_again_costs_the_directory_nothing(cluster: Cluster) -> None:
    cluster.start_directory()
    a, b = cluster.host("a").start(), cluster.host("b", warm_bytes=0).start()
    with a.connect() as giver, b.connect() as taker, b.connect() as other:
        assert matched(taker) == 0
        giver.save(TOKENS, blocks_of(TOKENS))
        assert eventually(lambda: matched(taker) == COUNT), "that it was nowhere is not kept"

        def again() -> bool:
            """Within a second, unless this machine sleeps: then once more."""
            assert matched(taker) == COUNT
            finds, cached = counted(b, "directory_finds"), counted(b, "directory_cached")
            assert matched(other) == COUNT
            return counted(b, "directory_finds") == finds and counted(b, "directory_cached") == cached + COUNT

        assert eventually(again)

        def dropped() -> bool:
            """A read of one block failed: it alone is asked for again."""
            assert matched(taker) == COUNT
            finds, cached = counted(b, "directory_finds"), counted(b, "directory_cached")
            other._session.send(Missed([chain()[7]]))
            assert matched(other) == COUNT
            return counted(b, "directory_finds") == finds + 1 and counted(b, "directory_cached") == cached + COUNT - 1

        assert eventually(dropped)


def test_a_hundred_that_start_at_once_tell_what_they_hold_a_few_at_a_time(cluster: Cluster) -> None:
    directory = cluster.start_directory()
    settings = cluster.settings("node")
    telling, most, told = set[int](), 0, set[int]()
    blocks = 2 * PUBLISH_BLOCKS_MAX  # two messages, and one that says that this was all

    def member(number: int) -> Member:
        name = f"node{number}"
        region = RegionDescription(name, 4096, 4096, blocks, name, "", "", "", HOST)
        description = NodeDescription(name, 1, name, "", (region,))

        def inventory() -> Iterator[Stored]:
            nonlocal most
            telling.add(number)
            most = max(most, len(telling))
            for slot in range(blocks):
                yield Stored(bytes(20) + (number * blocks + slot).to_bytes(32, "big"), 4096, slot, 2, 4096)
            telling.discard(number)
            told.add(number)

        return Member(name, lambda: description, inventory)

    async def start() -> None:
        links = [Shards(settings, member(number), lambda _: directory.endpoint) for number in range(100)]
        running = [asyncio.create_task(each.run()) for each in links]
        async with asyncio.timeout(120):
            await asyncio.gather(*(each.ready() for each in links))
            while directory.status().keys < 100 * blocks:
                await asyncio.sleep(0.05)
        for each in running:
            each.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    asyncio.run(start())
    assert len(told) == 100 and most <= INVENTORIES_MAX


def test_an_inventory_is_read_no_faster_than_the_shard_reads_it(cluster: Cluster) -> None:
    settings, blocks = cluster.settings("node"), 200 * PUBLISH_BLOCKS_MAX  # 36 MB: more than sockets hold
    given = 0

    def inventory() -> Iterator[Stored]:
        nonlocal given
        for slot in range(blocks):
            given += 1
            yield Stored(bytes(32) + slot.to_bytes(32, "big"), 4096, slot, 2, 4096)

    async def play() -> None:
        reading, over = asyncio.Event(), asyncio.Event()

        async def shard(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await wire.accept_async(reader, writer, SECRET)
            for message in (Welcome(1, [], []), Resync(ALL_PARTS)):
                wire.write_frame(writer, msgspec.msgpack.encode(message))
            await reading.wait()
            with contextlib.suppress(ProtocolError, OSError):
                while True:
                    await wire.read_frame(reader, settings.message_bytes_max)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            over.set()

        server = await asyncio.start_server(shard, "127.0.0.1", 0)
        endpoint = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        member = Member("node", lambda: NodeDescription("node", 1, "host", "", ()), inventory)
        node = Shards(settings, member, lambda _: endpoint)
        running = asyncio.create_task(node.run())
        async with asyncio.timeout(60):
            before = -1
            while not given or given != before:  # until it waits
                before = given
                await asyncio.sleep(0.5)
            assert given < blocks, "it waits for the shard"
            reading.set()
            await node.ready()
        assert given == blocks
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await over.wait()
        server.close()
        await server.wait_closed()

    asyncio.run(play())
