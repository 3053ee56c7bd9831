"""A tenant that is bound to regions: its blocks are only where it allows, whoever is asked and whatever others believe.

Goal: each of directory, sender and receiver keeps to it alone, so that one that does not know the rules changes nothing; who
names no region gets nothing. Method: real nodes with labels, with and without the tenants' file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvshare import keys
from kvshare.cluster_messages import Host as Hosting
from kvshare.messages import Expose, Shown
from kvshare.places import Location, ProcessMemory, Stored, WarmItem
from kvshare.region import Region
from kvshare.session import Session
from kvshare.transport.base import BlockStatus, ReadRequest, Targets
from kvshare.transport.choose import Transports, host_id
from kvshare.transport.tcp import TcpTransport
from tests.node.conftest import BLOCK_BYTES, BLOCK_SIZE, SECRET, SPACE, Cluster, Host, blocks_of, eventually
from tests.node.test_purge import ACME, TOKENS, files_with, found, keep_all, keys_of, tenant_of

FREE = list(range(9000, 9000 + 8 * BLOCK_SIZE))


@pytest.fixture
def rules(tmp_path: Path) -> str:
    path = tmp_path / "tenants.json"
    path.write_text('{"tenants": {"acme": {"regions": ["eu", "ch"]}}}')
    return str(path)


def saved(host: Host, tokens: list[int], tenant: str) -> int:
    """Blocks that the node has taken."""
    with tenant_of(host, tenant) as cache:
        return cache.save(tokens, blocks_of(tokens))


def counters(host: Host) -> dict[str, int]:
    assert host.node is not None
    return host.node.status().counters


@pytest.mark.parametrize(("region", "taken"), [("eu", 40), ("ch", 40), ("us", 0), ("", 0)])
def test_a_node_keeps_blocks_of_a_bound_tenant_only_where_it_allows(
    cluster: Cluster, rules: str, region: str, taken: int
) -> None:
    host = cluster.host("a", tenants_file=rules, region=region).start()
    assert saved(host, TOKENS, "acme") == taken
    assert saved(host, FREE, "other") == len(FREE) // BLOCK_SIZE
    assert found(host, TOKENS, "acme") == taken * BLOCK_SIZE
    assert found(host, FREE, "other") == len(FREE)
    assert bool(counters(host)["barred"]) == (taken == 0)


def test_peers_in_allowed_regions_share_and_others_do_not_find(cluster: Cluster, rules: str) -> None:
    cluster.start_directory(tenants_file=rules)
    eu, ch, us = (cluster.host(name, tenants_file=rules, region=name, warm_bytes=0).start() for name in ("eu", "ch", "us"))
    assert saved(eu, TOKENS, "acme") == 40
    assert saved(eu, FREE, "") == 8
    assert eventually(lambda: found(ch, TOKENS, "acme") == len(TOKENS))
    assert eventually(lambda: found(us, FREE, "") == len(FREE))
    assert found(us, TOKENS, "acme") == 0


def test_a_receiver_that_knows_the_rules_does_not_ask_and_does_not_load(cluster: Cluster, rules: str) -> None:
    """Neither directory nor sender know them."""
    cluster.start_directory()
    eu = cluster.host("eu", region="eu").start()
    us = cluster.host("us", region="us", tenants_file=rules, warm_bytes=0).start()
    saved(eu, TOKENS, "acme")
    saved(eu, FREE, "")
    assert eventually(lambda: found(us, FREE, "") == len(FREE))
    assert found(us, TOKENS, "acme") == 0


def test_a_sender_that_knows_the_rules_sends_nothing_to_who_may_not_have_it(cluster: Cluster, rules: str) -> None:
    """Neither directory nor receiver know them: locations are told, reads fail."""
    cluster.start_directory()
    eu = cluster.host("eu", region="eu", tenants_file=rules).start()
    us, nowhere = cluster.host("us", region="us", warm_bytes=0).start(), cluster.host("x", warm_bytes=0).start()
    saved(eu, TOKENS, "acme")
    saved(eu, FREE, "")
    for reader in (us, nowhere):
        assert eventually(lambda reader=reader: found(reader, FREE, "") == len(FREE))  # type: ignore[misc]
        with tenant_of(reader, "acme") as cache:
            assert eventually(lambda cache=cache: cache.match(TOKENS) > 0)  # type: ignore[misc]
            assert cache.load(TOKENS, np.zeros((40, BLOCK_BYTES), np.uint8)) == 0
    assert eu.node is not None
    server = next(one for one in eu.node.transports._transports if isinstance(one, TcpTransport))
    assert server.counters()["barred"] >= 80


def test_a_joiner_in_another_region_is_not_warmed_with_it(cluster: Cluster, rules: str) -> None:
    directory = cluster.start_directory(tenants_file=rules)
    eu = cluster.host("eu", tenants_file=rules, region="eu").start()
    saved(eu, TOKENS, "acme")
    saved(eu, FREE, "")
    for tokens, tenant in ((TOKENS, "acme"), (FREE, "")):
        with tenant_of(eu, tenant) as cache:
            assert eventually(lambda cache=cache, tokens=tokens: cache.match(tokens) == len(tokens))  # type: ignore[misc]
    assert eventually(lambda: directory.status().counters["hot_keys"] == 48)
    for name, pulled in (("us", 8), ("ch", 48)):
        host = cluster.host(name, tenants_file=rules, region=name).start()
        with tenant_of(host, "") as joiner:
            assert joiner.wait_warm(20.0).pulled == pulled


def test_what_former_settings_let_in_is_erased_at_the_start(cluster: Cluster, rules: str, tmp_path: Path) -> None:
    disk = {"disk_dir": str(tmp_path / "disk"), "disk_bytes": 4 << 20, "disk_admit": "all"}
    before = cluster.host("a", region="us", **disk).start()
    assert saved(before, TOKENS, "acme") == 40
    assert saved(before, FREE, "") == 8
    assert eventually(lambda: counters(before)["disk_blocks"] == 48)
    assert before.node is not None
    before.node.stop(unlink=False)
    assert files_with(tmp_path / "disk", TOKENS) and files_with(tmp_path, TOKENS)
    cluster.hosts.clear()
    after = cluster.host("a", region="us", tenants_file=rules, **disk).start()
    assert eventually(lambda: files_with(tmp_path, TOKENS) == [])
    assert found(after, TOKENS, "acme") == 0
    assert found(after, FREE, "") == len(FREE)


def test_the_object_store_has_a_region_too(cluster: Cluster, rules: str, tmp_path: Path) -> None:
    store = {"object_url": f"file://{tmp_path / 'bucket'}", "region": "eu", "tenants_file": rules}
    for name, where, kept in (("a", "us", False), ("b", "", False), ("c", "eu", True)):
        host = cluster.host(name, object_region=where, **store).start()
        saved(host, TOKENS, "acme")
        saved(host, FREE, "")
        keep_all(host)
        assert files_with(tmp_path / "bucket", FREE)
        assert bool(files_with(tmp_path / "bucket", TOKENS)) == kept


def test_an_engines_own_cache_is_not_told_of_since_who_reads_it_asks_nobody(cluster: Cluster, rules: str) -> None:
    directory = cluster.start_directory(tenants_file=rules)
    host = cluster.host("a", region="eu", tenants_file=rules).start()
    session = Session.connect(host.settings, SPACE, engine="engine", block_bytes=BLOCK_BYTES)
    memory = ProcessMemory(1, 1, "", "DRAM", 0, (4096,), (BLOCK_BYTES,), (BLOCK_BYTES,), 0, 8)
    named = [*keys_of(TOKENS, ACME), *keys_of(FREE, keys.NO_TENANT)]
    session.send(Expose(5, "", 64, BLOCK_BYTES, memory))
    session.send(Shown([Stored(key, 5, i, 2, BLOCK_BYTES) for i, key in enumerate(named)], []))
    assert eventually(lambda: directory.status().keys == 8)
    session.close()


def test_blocks_that_may_be_sent_are_sent_beside_those_that_may_not() -> None:
    region = Region.anonymous(4096, 4)
    names = [keys.prefix(SPACE.family(), tenant=ACME if i % 2 else keys.NO_TENANT) + bytes([i]) * 16 for i in range(4)]
    generations = [region.finish(i, region.begin(i), names[i], 4096, 0) for i in range(4)]

    def may_read(key: bytes, label: str) -> bool:
        return keys.tenant_of(key) != ACME or label == "eu"

    def statuses(label: str, slots: list[int]) -> list[int]:
        description = region.describe("a", "elsewhere", owner.endpoint())
        target = np.zeros((len(slots), 4096), np.uint8)
        with TcpTransport(SECRET, label=label) as reader:
            request = ReadRequest(
                np.array(slots, np.int64),
                np.array([generations[slot] for slot in slots], np.uint64),
                np.zeros(len(slots), np.uint64),
                Targets.strided(target.ctypes.data, 4096, np.arange(len(slots)), 4096),
            )
            completion = reader.read(description, request).wait()
            assert completion is not None
            return [int(status) for status in completion.statuses]

    with TcpTransport(SECRET, "127.0.0.1", may_read=may_read) as owner:
        owner.register(region)
        sent = BlockStatus.CORRUPT  # their checksums are nothing here: they came
        assert statuses("eu", [0, 1, 2, 3]) == [sent] * 4
        assert statuses("us", [0, 1, 2, 3]) == [sent, BlockStatus.STALE, sent, BlockStatus.STALE]
        assert statuses("", [1, 3]) == [BlockStatus.UNREACHABLE] * 2
        assert owner.counters()["barred"] == 4


def test_host_memory_is_not_given_to_readers_that_ask_nobody(cluster: Cluster) -> None:
    """NIXL's: whoever has the description reads. Where it cannot be used, nothing is registered in any case."""
    settings = cluster.settings("a", transports="nixl,tcp")
    transports = Transports(settings, host_id(), True, lambda _key, _label: True)
    region = Region.anonymous(4096, 4)
    transports.register(region)
    assert transports.memory_of(region) is None
    transports.deregister(region)
    transports.close()


def test_a_group_is_not_given_what_is_not_for_everybody(cluster: Cluster, rules: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host = cluster.host("a", region="eu", tenants_file=rules).start()
    node = host.node
    assert node is not None
    asked: list[int] = []
    monkeypatch.setattr(node.groups, "host", lambda question: asked.append(question.ask))
    where = Location("a", 8192, 0, 2, BLOCK_BYTES)
    free = WarmItem(keys_of(FREE, keys.NO_TENANT)[0], where)
    bound = WarmItem(keys_of(TOKENS, ACME)[0], where)
    assert node._host(Hosting(1, 3, [free, bound])) is None
    node._host(Hosting(2, 3, [free]))
    assert asked == [2]
