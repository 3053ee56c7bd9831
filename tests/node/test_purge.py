"""A purge reaches every tier of every node: nothing of it is found, validates, or lies in any file.

Goal: what was purged is gone, what was not is there, and nobody brings it back. Method: real nodes, directory and sessions;
every file of arenas, disks and the object store is searched for the bytes of the blocks.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import kvshare
from kvshare import cli, keys, native
from kvshare.cluster_messages import Erase
from kvshare.config import Settings
from kvshare.disk import DiskRegion
from kvshare.errors import RegionError
from kvshare.messages import Commit, Done, Expose, Purge, Reserve, Reserved, Shown
from kvshare.places import ProcessMemory, Stored
from kvshare.purge import PurgeScope
from kvshare.session import Session, call
from tests.node.conftest import BLOCK_BYTES, BLOCK_SIZE, SPACE, Cluster, Host, blocks_of, eventually

TOKENS = list(range(100, 100 + 40 * BLOCK_SIZE))
OTHERS = list(range(7000, 7000 + 24 * BLOCK_SIZE))
ACME = keys.tenant_tag("acme")


def prefix(tenant: bytes) -> bytes:
    return keys.prefix(SPACE.family(), tenant=tenant)


def keys_of(tokens: list[int], tenant: bytes) -> list[bytes]:
    return [prefix(tenant) + block_hash for block_hash in keys.chain(tokens, BLOCK_SIZE)]


def tenant_of(host: Host, name: str) -> kvshare.Cache:
    """A session whose blocks are this tenant's."""
    values = {**host.settings.__dict__, "tenant": name}
    return kvshare.connect(SPACE, block_bytes=BLOCK_BYTES, **values)


def save(host: Host, tokens: list[int], tenant: str) -> None:
    with tenant_of(host, tenant) as cache:
        assert cache.save(tokens, blocks_of(tokens)) == len(tokens) // BLOCK_SIZE


def found(host: Host, tokens: list[int], tenant: str) -> int:
    """Tokens that can be loaded there, each with its right bytes."""
    with tenant_of(host, tenant) as cache:
        count = cache.match(tokens)
        filled = np.zeros((len(tokens) // BLOCK_SIZE, BLOCK_BYTES), np.uint8)
        loaded = cache.load(tokens[:count], filled)
        assert (filled[: loaded // BLOCK_SIZE] == blocks_of(tokens)[: loaded // BLOCK_SIZE]).all()
        return loaded


def files_with(folder: Path, tokens: list[int]) -> list[str]:
    """Files below ``folder`` that have the bytes of any of these blocks; the middle of each is looked for."""
    patterns = [bytes(block[4000:4032]) for block in blocks_of(tokens)]
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and any(pattern in path.read_bytes() for pattern in patterns)
    ]


def purge(settings: Settings, **scope: object) -> dict[str, dict[str, int]]:
    """Purge by a session; blocks by node and tier. All nodes have done it."""
    answer = call(settings, lambda ask: Purge(ask, PurgeScope(**scope), False), 60.0)  # type: ignore[arg-type]
    assert answer.silent == [] and [node.faults for node in answer.nodes if node.faults] == []
    return {node.node: {tier.tier: tier.blocks for tier in node.tiers} for node in answer.nodes}


def test_a_tenant_is_erased_from_this_node_when_it_is_alone(cluster: Cluster, tmp_path: Path) -> None:
    host = cluster.host("a").start()
    save(host, TOKENS, "acme")
    save(host, OTHERS, "")
    assert files_with(tmp_path, TOKENS) and files_with(tmp_path, OTHERS)
    assert purge(host.settings, tenant="acme") == {"a": {"arena": 40}}
    assert files_with(tmp_path, TOKENS) == []
    assert found(host, TOKENS, "acme") == 0
    assert found(host, OTHERS, "") == len(OTHERS)
    assert purge(host.settings, tenant="acme") == {"a": {}}
    assert purge(host.settings, family=SPACE.family()) == {"a": {"arena": 24}}
    assert files_with(tmp_path, OTHERS) == []


def test_a_purge_by_prefix_takes_the_keys_that_begin_so(cluster: Cluster) -> None:
    host = cluster.host("a").start()
    save(host, TOKENS, "acme")
    some = keys_of(TOKENS, ACME)[7]
    assert purge(host.settings, prefix=some) == {"a": {"arena": 1}}
    assert found(host, TOKENS, "acme") == 7 * BLOCK_SIZE


def test_what_was_evicted_aborted_or_left_behind_does_not_stay_in_free_slots(cluster: Cluster, tmp_path: Path) -> None:
    """Bytes outlive their blocks in slots that nobody uses; a purge finds them there too."""
    host = cluster.host("a").start()
    save(host, TOKENS, "acme")
    node = host.node
    assert node is not None
    store = next(iter(node.memory.stores.values()))
    node._loop.call_soon_threadsafe(store.drop, keys_of(TOKENS, ACME))
    assert eventually(lambda: len(store) == 0)
    assert files_with(tmp_path, TOKENS)
    assert purge(host.settings, tenant="acme") == {"a": {}}
    assert files_with(tmp_path, TOKENS) == []


def test_a_save_that_is_under_way_is_not_committed_and_its_bytes_go_when_its_slot_has_rested(
    cluster: Cluster, tmp_path: Path
) -> None:
    host = cluster.host("a", quarantine_seconds=0.3).start()
    session = Session.connect(host.settings, SPACE, engine="e", block_bytes=BLOCK_BYTES)
    wanted = keys_of(TOKENS, ACME)
    answer = session.call(lambda ask: Reserve(ask, session.block_region, wanted, BLOCK_BYTES), 5.0)
    assert isinstance(answer, Reserved) and min(answer.slots) >= 0
    region = session.region
    assert region is not None
    for slot, block in zip(answer.slots, blocks_of(TOKENS), strict=True):
        native.view(region.slot_address(slot), BLOCK_BYTES, writable=True)[:] = memoryview(block)
    assert purge(host.settings, tenant="acme") == {"a": {}}
    checksums = [0] * len(answer.slots)
    done = session.call(lambda ask: Commit(ask, region.region, answer.slots, answer.generations, checksums), 5.0)
    assert isinstance(done, Done) and done.count == 0
    assert eventually(lambda: files_with(tmp_path, TOKENS) == [])
    session.close()


def test_three_nodes_and_three_tiers_hold_nothing_of_it_afterwards(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start_directory()
    store = f"file://{tmp_path / 'bucket'}"
    hosts = [
        cluster.host(
            name, warm_bytes=0, disk_dir=str(tmp_path / f"disk-{name}"), disk_bytes=4 << 20, disk_admit="all", object_url=store
        ).start()
        for name in "abc"
    ]
    save(hosts[0], TOKENS, "acme")
    save(hosts[0], OTHERS, "")
    for host in hosts[1:]:
        assert eventually(lambda host=host: found(host, TOKENS, "acme") == len(TOKENS))  # type: ignore[misc]
        save_what_is_missing(host, TOKENS, "acme")
    node = hosts[0].node
    assert node is not None
    keep_all(hosts[0])
    assert eventually(lambda: files_with(tmp_path / "bucket", TOKENS))
    assert eventually(lambda: all(files_with(tmp_path / f"disk-{name}", TOKENS) for name in "abc"))
    stale = {block.key: block for block in node.memory.inventory()}
    gone = purge(hosts[1].settings, tenant="acme")
    assert set(gone) == {"a", "b", "c"}
    assert all(tiers["arena"] == 40 and tiers["disk"] == 40 for tiers in gone.values())
    assert gone["b"]["object"] == 40 and "object" not in gone["a"]
    assert files_with(tmp_path, TOKENS) == []
    assert files_with(tmp_path / "bucket", OTHERS) and files_with(tmp_path / "disk-a", OTHERS)
    for host in hosts:
        assert found(host, TOKENS, "acme") == 0
        assert eventually(lambda host=host: found(host, OTHERS, "") == len(OTHERS))  # type: ignore[misc]
    arena = next(iter(node.memory.arenas.values()))
    told = [block for key, block in stale.items() if keys.tenant_of(key) == ACME and block.region == arena.region]
    assert told and not (arena.generations([block.slot for block in told]) == [block.generation for block in told]).any()


def save_what_is_missing(host: Host, tokens: list[int], tenant: str) -> None:
    with tenant_of(host, tenant) as cache:
        cache.save(tokens, blocks_of(tokens))


def keep_all(host: Host) -> None:
    """Everything to disk and object store, as before a scale to zero."""
    node = host.node
    assert node is not None
    wanted = [block.key for block in node.memory.inventory()]
    keeping = node.memory.tiers.keep(wanted, time.monotonic() + 20.0)
    asyncio.run_coroutine_threadsafe(keeping, node._loop).result(30.0)


def test_a_node_that_was_away_is_named_and_does_not_bring_it_back(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start_directory()
    a, b = cluster.host("a", warm_bytes=0).start(), cluster.host("b", warm_bytes=0).spawn()
    save(b, TOKENS, "acme")
    assert eventually(lambda: found(a, TOKENS, "acme") == len(TOKENS))
    purge(a.settings, prefix=keys_of(OTHERS, ACME)[0])  # of nothing: b has heard of this one
    b.kill()
    assert eventually(lambda: len(cluster.directory.status().nodes) == 1)  # type: ignore[union-attr]
    assert set(purge(a.settings, tenant="acme")) == {"a"}
    assert files_with(tmp_path, TOKENS)
    b.spawn()  # recovers its arena
    assert eventually(lambda: files_with(tmp_path, TOKENS) == [])
    assert found(a, TOKENS, "acme") == found(b, TOKENS, "acme") == 0


def test_a_node_that_hangs_is_named_and_the_others_are_purged(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvshare.purge_rounds.GATHER_SECONDS", 1.0)
    cluster.start_directory()
    a, b = cluster.host("a", warm_bytes=0).start(), cluster.host("b", warm_bytes=0).spawn()
    save(a, TOKENS, "acme")
    save(b, OTHERS, "acme")
    assert b.process is not None
    b.process.send_signal(signal.SIGSTOP)
    state = Path(f"/proc/{b.process.pid}/stat")
    assert eventually(lambda: state.read_text().rpartition(")")[2].split()[0] == "T")
    answer = call(a.settings, lambda ask: Purge(ask, PurgeScope("acme"), False), 30.0)
    assert [node.node for node in answer.nodes] == ["a"]
    assert answer.silent == ["node b did not answer: it is asked again when it is back"]
    assert files_with(tmp_path, TOKENS) == [] and files_with(tmp_path, OTHERS)
    b.process.send_signal(signal.SIGCONT)
    assert eventually(lambda: files_with(tmp_path, OTHERS) == [])


def test_a_directory_that_is_away_is_named_and_this_node_is_purged(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start_directory()
    a = cluster.host("a", warm_bytes=0).start()
    save(a, TOKENS, "acme")
    cluster.directory.stop()  # type: ignore[union-attr]
    answer = call(a.settings, lambda ask: Purge(ask, PurgeScope("acme"), False), 60.0)
    assert [tier.blocks for tier in answer.nodes[0].tiers] == [40]
    assert "run it again" in answer.silent[0]
    assert files_with(tmp_path, TOKENS) == []


def test_what_comes_right_after_a_purge_is_barred_and_later_it_is_welcome(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer whose turn has not come must not fill a node that is done."""
    monkeypatch.setattr("kvshare.purging.BARRED_SECONDS", 1.0)
    host = cluster.host("a").start()
    save(host, TOKENS, "acme")
    with tenant_of(host, "acme") as cache:
        purge(host.settings, tenant="acme")
        assert cache.save(TOKENS, blocks_of(TOKENS)) == 0
        assert eventually(lambda: cache.save(TOKENS, blocks_of(TOKENS)) == 40)
        assert cache.match(TOKENS) == len(TOKENS)


def test_a_purge_that_is_repeated_is_answered_and_takes_nothing_that_came_since(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvshare.purging.BARRED_SECONDS", 0.05)
    host = cluster.host("a").start()
    node = host.node
    assert node is not None
    erase = Erase(7, PurgeScope("acme"), False)
    answers: list[object] = []
    node._loop.call_soon_threadsafe(node.purger.begin, erase, answers.append)
    assert eventually(lambda: node.purger.counters["purges"] == 1)
    with tenant_of(host, "acme") as cache:
        assert eventually(lambda: cache.save(TOKENS, blocks_of(TOKENS)) == 40)
        node._loop.call_soon_threadsafe(node.purger.begin, erase, answers.append)
        assert eventually(lambda: len(answers) == 2) and answers[0] == answers[1]
        assert eventually(lambda: cache.match(TOKENS) == len(TOKENS))
    assert found(host, TOKENS, "acme") == len(TOKENS)
    assert node.purger.counters["purges"] == 1


def test_what_engines_expose_is_no_longer_told_of_and_not_told_again(cluster: Cluster) -> None:
    directory = cluster.start_directory()
    host = cluster.host("a").start()
    session = Session.connect(host.settings, SPACE, engine="engine", block_bytes=BLOCK_BYTES)
    memory = ProcessMemory(1, 1, "", "DRAM", 0, (4096,), (BLOCK_BYTES,), (BLOCK_BYTES,), 0, 8)
    blocks = [Stored(key, 5, i, 2, BLOCK_BYTES) for i, key in enumerate(keys_of(TOKENS, ACME))]
    session.send(Expose(5, "", 64, BLOCK_BYTES, memory))
    session.send(Shown(blocks, []))
    assert eventually(lambda: directory.status().keys == 40)
    withdrawn: list[bytes] = []
    session.on_withdraw = withdrawn.extend
    assert purge(host.settings, tenant="acme") == {"a": {"engines": 40}}
    assert eventually(lambda: withdrawn == [block.key for block in blocks])
    assert directory.status().keys == 0
    session.send(Shown(blocks, []))
    fresh = [Stored(blocks[0].key, 5, 50, 8, BLOCK_BYTES)]
    node = host.node
    assert node is not None
    node._loop.call_soon_threadsafe(setattr, node.gate, "_purges", ())  # as after a while
    session.send(Shown(blocks, []))
    session.send(Shown(fresh, []))  # computed anew
    assert eventually(lambda: directory.status().keys == 1)
    session.close()


def test_a_disk_that_fails_is_named_and_what_it_may_still_hold_is_not_found(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RegionError("the disk is broken")

    host = cluster.host("a", disk_dir=str(tmp_path / "disk"), disk_bytes=4 << 20, disk_admit="all").start()
    save(host, TOKENS, "acme")
    node = host.node
    assert node is not None
    assert eventually(lambda: node.status().counters["disk_blocks"] == 40)
    with monkeypatch.context() as broken:
        broken.setattr(DiskRegion, "punch", fails)
        answer = call(host.settings, lambda ask: Purge(ask, PurgeScope("acme"), False), 30.0)
        assert answer.nodes[0].faults == ["the disk may still hold some of it (the disk is broken): run it again"]
        assert found(host, TOKENS, "acme") == 0
        assert files_with(tmp_path / "disk", TOKENS)
    assert purge(host.settings, tenant="acme") == {"a": {}}
    assert files_with(tmp_path, TOKENS) == []


def test_destroying_the_key_erases_copies_that_nobody_reaches(cluster: Cluster, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    keys_dir, disk = tmp_path / "keys", tmp_path / "disk"
    keys_dir.mkdir()
    values = {"keys_dir": str(keys_dir), "disk_bytes": 4 << 20, "disk_admit": "all"}
    host = cluster.host("a", disk_dir=str(disk), **values).start()
    save(host, TOKENS, "acme")
    save(host, OTHERS, "other")
    node = host.node
    assert node is not None
    assert eventually(lambda: node.status().counters["disk_blocks"] == 64)
    node.stop()
    shutil.copytree(disk, tmp_path / "backup")
    cluster.hosts.clear()
    again = cluster.host("a", disk_dir=str(disk), **values).start()
    answer = call(again.settings, lambda ask: Purge(ask, PurgeScope("acme"), True), 30.0)
    assert answer.nodes[0].key_destroyed and answer.nodes[0].faults == []
    assert not (keys_dir / f"{ACME.hex()}.key").exists()
    again.stop()
    cluster.hosts.clear()
    restored = cluster.host("b", disk_dir=str(tmp_path / "backup"), **values).start()
    assert eventually(lambda: found(restored, OTHERS, "other") == len(OTHERS))
    assert found(restored, TOKENS, "acme") == 0


def test_a_key_is_destroyed_of_a_tenant_only(cluster: Cluster) -> None:
    host = cluster.host("a").start()
    save(host, TOKENS, "")
    answer = call(host.settings, lambda ask: Purge(ask, PurgeScope(family=SPACE.family()), True), 30.0)
    assert answer.nodes == [] and "name one" in answer.silent[0]
    assert found(host, TOKENS, "") == len(TOKENS)


def run_cli(host: Host, *arguments: str) -> int:
    settings = [f"--set={name}={getattr(host.settings, name)}" for name in ("runtime_dir", "node_name", "shm_dir")]
    return cli.main(["purge", *arguments, *settings])


def test_the_command_asks_first_and_reports_each_node(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    host = cluster.host("a").start()
    save(host, TOKENS, "acme")
    monkeypatch.setattr("builtins.input", lambda _: "no")
    assert run_cli(host, "--tenant", "acme") == 1
    assert "nothing was purged" in capsys.readouterr().out
    assert run_cli(host, "--tenant", "acme", "--yes") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"a: arena 40 blocks, {40 * BLOCK_BYTES} bytes", "purged tenant acme: 40 blocks",
    ]  # fmt: skip
    assert run_cli(host, "--family", "abcd", "--yes") == 2
    assert "32 hexadecimal digits" in capsys.readouterr().err
    assert run_cli(host, "--prefix", "no hex", "--yes") == 2
    assert run_cli(host, "--prefix", "00", "--destroy-key", "--yes") == 2
