"""Tenants on real nodes: their blocks are their own, as many as they may have, for as long as they may be kept, and unreadable
at rest without their keys."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import kvshare
from kvshare import keys
from kvshare.errors import ConfigError
from kvshare.node import Node
from kvshare.vault import Vault
from tests.node.conftest import BLOCK_BYTES, BLOCK_SIZE, SPACE, Cluster, Host, blocks_of, eventually

TOKENS = list(range(8 * BLOCK_SIZE))
BLOCKS = 8
ACME = keys.tenant_tag("acme")
PATIENT = 20.0


def file_of(folder: Path, **acme: object) -> str:
    """A tenants' file in which acme has these limits."""
    path = folder / "tenants.json"
    path.write_text(json.dumps({"tenants": {"acme": acme}}))
    return str(path)


def key_of(tenant: str, block: int) -> bytes:
    prefix = keys.prefix(SPACE.family(), tenant=keys.tenant_tag(tenant))
    return prefix + keys.chain(TOKENS, BLOCK_SIZE)[block]


def end_of(host: Host, block: int = 0) -> int:
    """When acme's block ends on this host: seconds since 2020."""
    assert host.node is not None
    found = host.node.memory.lookup(key_of("acme", block))
    assert found is not None
    return found.expires


def counter(host: Host, name: str) -> int:
    assert host.node is not None
    return host.node.status().counters.get(name, 0)


def save(cache: kvshare.Cache, tenant: str) -> int:
    return cache.save(TOKENS, blocks_of(TOKENS), tenant=tenant)


def load(cache: kvshare.Cache, tenant: str) -> int:
    """Blocks loaded; their bytes are right."""
    blocks = blocks_of(TOKENS)
    filled = np.zeros_like(blocks)
    count = cache.load(TOKENS, filled, tenant=tenant) // BLOCK_SIZE
    assert (filled[:count] == blocks[:count]).all()
    return count


def test_a_tenant_finds_its_own_blocks_only(cluster: Cluster) -> None:
    host = cluster.host("a", tenant="house").start()
    with host.connect() as cache:
        assert save(cache, "acme") == BLOCKS
        assert [load(cache, "acme"), cache.match(TOKENS, tenant="other"), cache.match(TOKENS)] == [BLOCKS, 0, 0]
        assert cache.save(TOKENS, blocks_of(TOKENS)) == BLOCKS
        assert load(cache, "house") == BLOCKS
        assert counter(host, f"tenant_{ACME.hex()}_bytes") == BLOCKS * BLOCK_BYTES


@pytest.mark.parametrize("name", ["a b", "", "x" * 65, "ä"])
def test_a_name_that_is_none_is_refused(cluster: Cluster, name: str) -> None:
    with cluster.host("a").start().connect() as cache:
        for call in (cache.match, lambda tokens, tenant: save(cache, tenant)):
            with pytest.raises(ValueError, match="use 1 to 64 letters"):
                call(TOKENS, tenant=name)


def test_a_tenant_at_its_limit_keeps_what_it_saved_last_and_costs_nobody_a_block(cluster: Cluster, tmp_path: Path) -> None:
    host = cluster.host("a", tenants_file=file_of(tmp_path, bytes_max=4 * BLOCK_BYTES)).start()
    with host.connect() as cache:
        assert save(cache, "other") == BLOCKS
        for block in range(BLOCKS):
            part = TOKENS[: (block + 1) * BLOCK_SIZE]
            cache.save(part, blocks_of(TOKENS)[: block + 1], tenant="acme")
        assert load(cache, "other") == BLOCKS
        assert counter(host, f"tenant_{ACME.hex()}_bytes") == 4 * BLOCK_BYTES
        assert counter(host, "over_quota") > 0


def test_what_is_over_is_found_by_nobody_and_told_as_gone(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start_directory()
    limits = {"tenants_file": file_of(tmp_path, ttl_seconds=2)}
    one, other = (cluster.host(name, **limits).start() for name in "ab")
    with one.connect() as here, other.connect() as there:
        assert save(here, "acme") == save(here, "other") == BLOCKS
        assert eventually(lambda: there.match(TOKENS, tenant="acme") == len(TOKENS) or counter(one, "expired"))
        assert eventually(lambda: counter(one, "expired") == BLOCKS)
        assert here.match(TOKENS, tenant="acme") == 0
        assert eventually(lambda: there.match(TOKENS, tenant="acme") == 0)
        assert load(here, "other") == BLOCKS
        assert counter(one, f"tenant_{ACME.hex()}_bytes") == 0
        assert save(here, "acme") == BLOCKS


def test_a_copy_on_another_node_ends_with_its_original(cluster: Cluster, tmp_path: Path) -> None:
    """Also where that node knows no limits: who saves what it loaded does not begin anew."""
    cluster.start_directory()
    one = cluster.host("a", tenants_file=file_of(tmp_path, ttl_seconds=1000), lookup_seconds=PATIENT).start()
    two = cluster.host("b", lookup_seconds=PATIENT).start()
    with one.connect() as here:
        save(here, "acme")
        with two.connect() as there:
            assert eventually(lambda: there.match(TOKENS, tenant="acme") == len(TOKENS))
            assert load(there, "acme") == BLOCKS
            save(there, "acme")
        assert end_of(two) == end_of(one) > 0


def test_warm_up_copies_end_with_their_originals(cluster: Cluster, tmp_path: Path) -> None:
    directory = cluster.start_directory()
    one = cluster.host("a", tenants_file=file_of(tmp_path, ttl_seconds=1000)).start()
    with one.connect() as here:
        save(here, "acme")
        assert eventually(lambda: here.match(TOKENS, tenant="acme") == len(TOKENS))
        assert eventually(lambda: directory.status().counters["hot_keys"] == BLOCKS)
        two = cluster.host("b").start()
        with two.connect() as there:
            assert there.wait_warm(10.0).pulled == BLOCKS
            assert load(there, "acme") == BLOCKS
            assert two.node is not None and two.node.memory.lookup(key_of("acme", 0)) is not None
            assert end_of(two) == end_of(one) > 0


def test_a_joiner_is_warmed_with_its_own_tenants_blocks_first(cluster: Cluster) -> None:
    directory = cluster.start_directory()
    one = cluster.host("a").start()
    with one.connect() as here:
        for tenant, lookups in (("acme", 1), ("other", 3)):
            save(here, tenant)
            assert eventually(lambda tenant=tenant: here.match(TOKENS, tenant=tenant) == len(TOKENS))
            for _ in range(lookups):
                here.match(TOKENS, tenant=tenant)
        assert eventually(lambda: directory.status().counters["hot_keys"] == 2 * BLOCKS)
        two = cluster.host("b", tenant="acme", warm_bytes=BLOCKS * BLOCK_BYTES).start()
        with two.connect() as there:
            assert there.wait_warm(10.0).pulled == BLOCKS
            assert two.node is not None
            assert {keys.tenant_of(block.key) for block in two.node.memory.inventory()} == {ACME}


def test_a_restart_gives_nobody_more_time(cluster: Cluster, tmp_path: Path) -> None:
    host = cluster.host("a", tenants_file=file_of(tmp_path, ttl_seconds=1000)).start()
    with host.connect() as cache:
        save(cache, "acme")
    before = end_of(host)
    assert host.node is not None
    host.node.stop(unlink=False)
    host.start()
    assert end_of(host) == before > 0


def test_what_ended_while_no_node_ran_is_not_recovered(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = cluster.host("a", tenants_file=file_of(tmp_path, ttl_seconds=1000)).start()
    with host.connect() as cache:
        save(cache, "acme")
        save(cache, "other")
        end = end_of(host)
    assert host.node is not None
    host.node.stop(unlink=False)
    monkeypatch.setattr("kvshare.slots.second_now", lambda: end)
    host.start()
    with host.connect() as cache:
        assert cache.match(TOKENS, tenant="acme") == 0
        assert load(cache, "other") == BLOCKS


@pytest.mark.parametrize(("setting", "content"), [("tenants_file", "{"), ("tenants_file", None), ("keys_dir", None)])
def test_a_node_does_not_start_with_rules_or_keys_that_it_cannot_follow(
    cluster: Cluster, tmp_path: Path, setting: str, content: str | None
) -> None:
    path = tmp_path / "rules"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=setting):
        Node(cluster.settings("a", **{setting: str(path)})).start()
    fresh = cluster.host("a").start()
    with fresh.connect() as cache:
        assert save(cache, "acme") == BLOCKS


# --- at rest ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sealed(tmp_path: Path) -> dict[str, object]:
    """Settings of a node that keeps all it saves on disk, under its tenants' keys."""
    (tmp_path / "keys").mkdir()
    disk, keys_dir = str(tmp_path / "disk"), str(tmp_path / "keys")
    return {"disk_dir": disk, "keys_dir": keys_dir, "disk_admit": "all", "lookup_seconds": PATIENT}


def fill(host: Host) -> None:
    with host.connect() as cache:
        for tenant in ("acme", "other"):
            save(cache, tenant)
    assert eventually(lambda: counter(host, "disk_blocks") == 2 * BLOCKS)


def test_what_lies_on_disk_is_sealed_and_comes_back(cluster: Cluster, tmp_path: Path, sealed: dict[str, object]) -> None:
    first = cluster.host("a", **sealed).start()
    fill(first)
    first.stop()
    files = [path.read_bytes() for path in (tmp_path / "disk").rglob("*") if path.is_file()]
    blocks = blocks_of(TOKENS)
    assert sum(map(len, files)) > 2 * blocks.nbytes
    assert not any(block.tobytes()[at : at + 64] in data for data in files for block in blocks for at in (0, 4096))
    second = cluster.host("a", **sealed).start()
    assert eventually(lambda: counter(second, "disk_blocks") == 2 * BLOCKS)
    with second.connect() as cache:
        assert [load(cache, "acme"), load(cache, "other")] == [BLOCKS, BLOCKS]


def test_a_destroyed_key_erases_its_tenants_blocks_and_no_others(
    cluster: Cluster, tmp_path: Path, sealed: dict[str, object]
) -> None:
    first = cluster.host("a", **sealed).start()
    fill(first)
    first.stop()
    assert Vault.open(str(tmp_path / "keys")).destroy(ACME)
    second = cluster.host("a", **sealed).start()
    with second.connect() as cache:
        assert eventually(lambda: load(cache, "other") == BLOCKS)
        assert load(cache, "acme") == 0
        save(cache, "acme")  # under a new key
        assert load(cache, "acme") == BLOCKS


def test_limits_hold_on_disk_too(cluster: Cluster, tmp_path: Path, sealed: dict[str, object]) -> None:
    limits = file_of(tmp_path, bytes_max=4 * BLOCK_BYTES, ttl_seconds=1000)
    host = cluster.host("a", **sealed, tenants_file=limits).start()
    acme_bytes = f"tenant_{ACME.hex()}_disk_bytes"
    with host.connect() as cache:
        save(cache, "other")
        save(cache, "acme")  # the first half of the chain is all that it may have
        assert eventually(lambda: counter(host, "disk_blocks") == BLOCKS + 4)
        assert counter(host, acme_bytes) == 4 * BLOCK_BYTES
        more = list(range(1000, 1000 + 2 * BLOCK_SIZE))
        cache.save(more, blocks_of(more), tenant="acme")
    assert eventually(lambda: counter(host, "disk_stored") == BLOCKS + 6)
    assert counter(host, "disk_blocks") == BLOCKS + 4 and counter(host, acme_bytes) == 4 * BLOCK_BYTES
    assert host.node is not None and host.node.memory.tiers.disk is not None
    ends = {block.key: block.expires for block in host.node.memory.tiers.disk.inventory()}
    assert [ends[key_of("acme", block)] for block in range(2)] == [end_of(host, block) for block in range(2)]
    assert sum(end > 0 for end in ends.values()) == 4
