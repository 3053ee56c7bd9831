"""A node leaves. Goal: what only it has is at peers, or on disk, before it goes, and nobody is sent to where nothing is;
whatever dies or is slow meanwhile costs only itself. Method: two and three real nodes and a directory; bytes are compared."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import numpy as np

from kvshare import keys
from kvshare.messages import Drained
from tests.node.conftest import BLOCK_SIZE, SPACE, Cluster, Host, blocks_of, eventually

COUNT = 40
BIG = {"arena_bytes": 64 << 20, "arena_chunk_bytes": 16 << 20}


def tokens_of(number: int, count: int = COUNT) -> list[int]:
    """A prompt of ``count`` blocks that shares nothing with others."""
    return list(range(number * 10_000, number * 10_000 + count * BLOCK_SIZE))


def keys_of(tokens: list[int]) -> list[bytes]:
    return [keys.prefix(SPACE.family()) + block for block in keys.chain(tokens, BLOCK_SIZE)]


def held(host: Host) -> set[bytes]:
    assert host.node is not None
    return {block.key for block in host.node.memory.inventory()}


def loaded(cache, tokens: list[int]) -> int:
    """Blocks loaded; what was loaded has the right bytes."""
    blocks = blocks_of(tokens)
    filled = np.zeros_like(blocks)
    count = cache.load(tokens, filled) // BLOCK_SIZE
    assert (filled[:count] == blocks[:count]).all()
    return count


def drained(host: Host, seconds: float = 10.0) -> Drained:
    assert host.node is not None
    result = host.node.drain(seconds)
    assert result is not None
    return result


def known(cluster: Cluster, locations: int) -> bool:
    """Does the directory know so many pairs of block and node?"""
    assert cluster.directory is not None
    directory = cluster.directory
    return eventually(lambda: directory.status().counters["locations"] == locations)


def test_what_only_the_leaving_node_has_moves_to_a_peer_and_nothing_else(cluster: Cluster) -> None:
    cluster.start_directory()
    a, b = cluster.host("a").start(), cluster.host("b").start()
    own, common = tokens_of(1), tokens_of(2)
    with a.connect() as one, b.connect() as two:
        one.save(own, blocks_of(own))
        one.save(common, blocks_of(common))
        two.save(common, blocks_of(common))
        assert known(cluster, 3 * COUNT)
        result = drained(a)
        assert (result.moved, result.kept, result.lost) == (COUNT, 0, 0)
        assert held(b) == {*keys_of(own), *keys_of(common)}
        a.stop()
        assert loaded(two, own) == loaded(two, common) == COUNT


def test_the_hottest_move_when_room_is_short_and_push_nothing_out(cluster: Cluster) -> None:
    cluster.start_directory()
    small = {"arena_bytes": 1 << 20, "warm_bytes": 0}  # 128 blocks
    a, b = cluster.host("a", warm_bytes=0).start(), cluster.host("b", **small).start()
    cold, hot, others = tokens_of(1, 50), tokens_of(2, 50), tokens_of(3, 90)
    with a.connect() as one, b.connect() as two:
        two.save(others, blocks_of(others))
        one.save(cold, blocks_of(cold))
        one.save(hot, blocks_of(hot))
        assert known(cluster, 190)
        for _ in range(3):
            assert one.match(hot) == len(hot)
        assert eventually(lambda: cluster.directory is not None and cluster.directory.status().counters["hot_keys"] >= 50)
        result = drained(a)
        assert (result.moved, result.kept, result.lost) == (38, 0, 62)
        assert held(b) == {*keys_of(others), *keys_of(hot)[:38]}, "the head of the hottest chain, into what was free"


def test_several_peers_share_what_moves(cluster: Cluster) -> None:
    cluster.start_directory()
    a = cluster.host("a", warm_bytes=0).start()
    b, c = (cluster.host(name, arena_bytes=1 << 20, warm_bytes=0).start() for name in "bc")
    prompts = [tokens_of(number, 50) for number in range(4)]
    with a.connect() as one, b.connect(), c.connect():
        for tokens in prompts:
            one.save(tokens, blocks_of(tokens))
        assert known(cluster, 200)
        result = drained(a)
        assert (result.moved, result.lost) == (200, 0)
        assert not held(b) & held(c), "each block has one taker"
        assert held(b) | held(c) == {key for tokens in prompts for key in keys_of(tokens)}


def test_a_reader_that_asks_throughout_never_misses_a_block_that_moves(cluster: Cluster) -> None:
    cluster.start_directory()
    a, b = (cluster.host(name, warm_bytes=0).start() for name in "ab")
    c = cluster.host("c", arena_bytes=1 << 20, warm_bytes=0).start()
    tokens, filler = tokens_of(1), tokens_of(2, 128)
    misses, loads, over = [], [0], threading.Event()
    with a.connect() as one, c.connect() as reader:
        reader.save(filler, blocks_of(filler))  # so that nothing moves to the reader's own host
        one.save(tokens, blocks_of(tokens))
        assert known(cluster, 128 + COUNT)
        assert loaded(reader, tokens) == COUNT

        def read() -> None:
            while not over.is_set():
                count = loaded(reader, tokens)
                loads[0] += 1
                if count != COUNT:
                    misses.append(count)

        thread = threading.Thread(target=read)
        thread.start()
        result = drained(a)
        at_the_end = loads[0]
        a.stop()
        assert eventually(lambda: loads[0] > at_the_end + 20)
        over.set()
        thread.join()
        assert (result.moved, result.lost) == (COUNT, 0)
        assert held(b) == set(keys_of(tokens))
        assert misses == [], f"of {loads[0]} loads"


def test_a_peer_that_dies_meanwhile_costs_nothing_where_another_has_room(cluster: Cluster) -> None:
    directory = cluster.start_directory()
    # A megabyte each second: the drain lasts long enough to be disturbed.
    a = cluster.host("a", tcp_bytes_per_second=10**6, tcp_streams=1, warm_bytes=0).start()
    b, c = cluster.host("b", warm_bytes=0).spawn(), cluster.host("c", arena_bytes=1 << 20, warm_bytes=0).start()
    filler, prompts = tokens_of(9, 28), [tokens_of(number, 50) for number in range(2)]
    results: list[Drained] = []
    with a.connect() as one, c.connect() as other:
        other.save(filler, blocks_of(filler))
        for tokens in prompts:
            one.save(tokens, blocks_of(tokens))
        assert known(cluster, 128)
        thread = threading.Thread(target=lambda: results.append(drained(a, 30.0)))
        thread.start()
        assert eventually(lambda: directory.status().counters.get("leaves", 0) > 0)
        b.kill()
        thread.join()
        assert (results[0].moved, results[0].lost) == (100, 0)
        assert held(c) == {*keys_of(filler), *(key for tokens in prompts for key in keys_of(tokens))}
        a.stop()
        assert [loaded(other, tokens) for tokens in prompts] == [50, 50]
        b.spawn().stop()  # gives back what the killed one left


def test_the_deadline_ends_it_and_what_did_not_move_is_said(cluster: Cluster, caplog) -> None:
    cluster.start_directory()
    a = cluster.host("a", tcp_bytes_per_second=4 * 10**6, tcp_streams=1, warm_bytes=0, **BIG).start()
    b = cluster.host("b", warm_bytes=0, **BIG).start()
    tokens = tokens_of(1, 1000)
    with a.connect() as one:
        one.save(tokens, blocks_of(tokens))
        assert known(cluster, 1000)
        result = drained(a, 2.0)
        assert result.lost > 0 and result.moved + result.lost <= 1000
        assert len(held(b)) >= 1000 - result.lost, "what is not lost is there"
        assert f"{result.lost} blocks are nowhere but in this node's memory" in caplog.text
        assert "set 'disk_dir' or 'object_url'" in caplog.text
        assert eventually(lambda: b.node is not None and b.node.check() == [])


def test_without_peers_everything_goes_to_the_disk_and_comes_back(cluster: Cluster, tmp_path) -> None:
    a = cluster.host("a", disk_dir=str(tmp_path / "disk"), directory="").start()
    tokens = tokens_of(1)
    with a.connect() as one:
        one.save(tokens, blocks_of(tokens))
        result = drained(a)
        assert (result.moved, result.kept, result.lost) == (0, COUNT, 0)
    a.stop()
    a.start()
    with a.connect() as one:
        assert eventually(lambda: loaded(one, tokens) == COUNT)


def test_what_peers_have_no_room_for_goes_to_the_disk(cluster: Cluster, tmp_path) -> None:
    cluster.start_directory()
    a = cluster.host("a", disk_dir=str(tmp_path / "disk"), warm_bytes=0).start()
    b = cluster.host("b", arena_bytes=1 << 20, warm_bytes=0).start()
    tokens, others = tokens_of(1, 100), tokens_of(2, 68)
    with a.connect() as one, b.connect() as two:
        two.save(others, blocks_of(others))
        one.save(tokens, blocks_of(tokens))
        assert known(cluster, 168)
        result = drained(a)
        assert (result.moved, result.kept, result.lost) == (60, 40, 0)
        assert held(b) == {*keys_of(others), *keys_of(tokens)[:60]}


def test_a_directory_that_dies_meanwhile_leaves_the_disk(cluster: Cluster, tmp_path) -> None:
    directory = cluster.start_directory()
    disk = str(tmp_path / "disk")
    a = cluster.host("a", tcp_bytes_per_second=10**6, tcp_streams=1, warm_bytes=0, disk_dir=disk, **BIG).start()
    b = cluster.host("b", warm_bytes=0).start()
    tokens = tokens_of(1, 200)
    results: list[Drained] = []
    with a.connect() as one:
        one.save(tokens, blocks_of(tokens))
        assert known(cluster, 200)
        thread = threading.Thread(target=lambda: results.append(drained(a, 6.0)))
        thread.start()
        assert eventually(lambda: directory.status().counters.get("leaves", 0) > 0)
        directory.stop()
        thread.join()
        assert results[0].kept == 200 and results[0].lost == 0, "nobody knows what others have: everything is kept"
        assert b.node is not None and b.node.check() == []


def test_a_directory_that_comes_back_is_asked_again(cluster: Cluster) -> None:
    directory = cluster.start_directory()
    port = int(directory.endpoint.rpartition(":")[2])
    a = cluster.host("a", tcp_bytes_per_second=10**6, tcp_streams=1, warm_bytes=0, **BIG).start()
    b = cluster.host("b", warm_bytes=0).start()
    tokens = tokens_of(1, 200)
    results: list[Drained] = []
    with a.connect() as one:
        one.save(tokens, blocks_of(tokens))
        assert known(cluster, 200)
        thread = threading.Thread(target=lambda: results.append(drained(a, 40.0)))
        thread.start()
        assert eventually(lambda: directory.status().counters.get("leaves", 0) > 0)
        directory.stop()
        cluster.start_directory(port)
        thread.join()
        assert results[0].lost == 0
        assert held(b) == set(keys_of(tokens))


def test_a_node_that_is_killed_while_it_hands_over_leaves_whole_blocks_at_its_peer(cluster: Cluster) -> None:
    directory = cluster.start_directory()
    a = cluster.host("a", tcp_bytes_per_second=10**6, tcp_streams=1, warm_bytes=0, drain_seconds=30.0).spawn()
    b = cluster.host("b", warm_bytes=0).start()
    prompts = [tokens_of(number, 20) for number in range(15)]
    with b.connect() as two:
        one = a.connect()
        for tokens in prompts:
            one.save(tokens, blocks_of(tokens))
        assert known(cluster, 300)
        assert a.process is not None
        a.process.terminate()
        assert eventually(lambda: directory.status().counters.get("leaves", 0) > 0)
        time.sleep(0.5)
        a.kill()
        one.close()
        assert eventually(lambda: [node.node for node in directory.status().nodes] == ["b"])
        assert b.node is not None and eventually(lambda: b.node is not None and b.node.check() == [])
        for tokens in prompts:
            count = loaded(two, tokens)  # compares bytes
            assert count == len([key for key in keys_of(tokens) if key in held(b)])
        a.spawn().stop()  # gives back what the killed one left


def test_a_signal_hands_over_and_a_second_one_ends_it_at_once(cluster: Cluster) -> None:
    directory = cluster.start_directory()
    a, b = cluster.host("a", warm_bytes=0).spawn(), cluster.host("b", warm_bytes=0).start()
    tokens = tokens_of(1)
    with a.connect() as one:
        one.save(tokens, blocks_of(tokens))
    assert known(cluster, COUNT)
    assert a.process is not None
    a.process.terminate()
    assert a.process.wait(20) == 0
    assert held(b) == set(keys_of(tokens))
    slow = {"tcp_bytes_per_second": 10**6, "tcp_streams": 1, "drain_seconds": 600.0, **BIG}
    c = cluster.host("c", warm_bytes=0, **slow).spawn()
    with c.connect() as three:
        for number in range(2, 5):
            three.save(tokens_of(number, 1000), blocks_of(tokens_of(number, 1000)))
        assert known(cluster, COUNT + 3000)
        assert c.process is not None
        before = directory.status().counters["leaves"]
        c.process.terminate()
        assert eventually(lambda: directory.status().counters["leaves"] > before)
        c.process.terminate()
        assert c.process.wait(30) == 0


def test_nothing_is_saved_where_everything_has_moved(cluster: Cluster) -> None:
    cluster.start_directory()
    a, b = cluster.host("a", warm_bytes=0).start(), cluster.host("b", warm_bytes=0).start()
    tokens, late = tokens_of(1), tokens_of(2)
    with a.connect() as one:
        one.save(tokens, blocks_of(tokens))
        assert drained(a).moved == COUNT
        assert one.save(late, blocks_of(late)) == 0
        assert loaded(one, tokens) == COUNT, "reads are answered to the end"
    assert held(b) == set(keys_of(tokens))


def test_what_an_engine_saves_while_its_node_begins_to_leave_moves_too(cluster: Cluster) -> None:
    cluster.start_directory()
    a, b = cluster.host("a", warm_bytes=0).start(), cluster.host("b", warm_bytes=0).start()
    prompts = [tokens_of(number, 10) for number in range(20)]
    accepted: list[bytes] = []
    with a.connect() as one:

        def save() -> None:
            for tokens in prompts:
                count = one.save(tokens, blocks_of(tokens))  # all, or nothing once the node takes no more
                accepted.extend(keys_of(tokens)[:count])

        one.save(prompts[0], blocks_of(prompts[0]))
        accepted += keys_of(prompts[0])
        thread = threading.Thread(target=save)
        thread.start()
        result = drained(a)
        thread.join()
    assert result.lost == 0 and result.moved == len(accepted)
    assert held(b) == set(accepted)


def test_two_that_leave_do_not_rely_on_each_other(cluster: Cluster) -> None:
    cluster.start_directory()
    a, b, c = (cluster.host(name, warm_bytes=0).start() for name in "abc")
    tokens = tokens_of(1)
    with a.connect() as one, b.connect() as two:
        one.save(tokens, blocks_of(tokens))
        two.save(tokens, blocks_of(tokens))
        assert known(cluster, 2 * COUNT)
        results: list[Drained] = []
        threads = [threading.Thread(target=lambda host=host: results.append(drained(host))) for host in (a, b)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [result.lost for result in results] == [0, 0]
        assert held(c) == set(keys_of(tokens))


def command(host: Host, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the `kvshare` command beside a spawned node, with its settings."""
    line = [sys.executable, "-m", "kvshare", *arguments]
    return subprocess.run(line, env=host.environment(), capture_output=True, text=True, timeout=60, check=False)


def test_the_command_drains_the_node_and_says_what_became_of_its_blocks(cluster: Cluster) -> None:
    cluster.start_directory()
    a, b = cluster.host("a", warm_bytes=0).spawn(), cluster.host("b", warm_bytes=0).start()
    tokens = tokens_of(1)
    with a.connect() as one:
        one.save(tokens, blocks_of(tokens))
    assert known(cluster, COUNT)
    done = command(a, "drain", "--timeout", "10")
    assert done.returncode == 0 and f"{COUNT} blocks moved to peers, 0 kept" in done.stdout
    assert a.process is not None and a.process.wait(20) == 0
    assert held(b) == set(keys_of(tokens))
    again = command(a, "drain")
    assert again.returncode == 1 and "no node listens" in again.stderr


def test_a_host_that_stays_may_keep_the_arena_for_its_next_node(cluster: Cluster) -> None:
    a = cluster.host("a").spawn()
    tokens = tokens_of(1)
    with a.connect() as one:
        one.save(tokens, blocks_of(tokens))
    lost = command(a, "drain", "--keep-arena")
    assert lost.returncode == 0 and f"{COUNT} left in the arena's files" in lost.stdout
    assert a.process is not None and a.process.wait(20) == 0
    a.spawn()
    with a.connect() as one:
        assert loaded(one, tokens) == COUNT
    lost = command(a, "drain")
    assert lost.returncode == 1 and f"{COUNT} lost" in lost.stdout
