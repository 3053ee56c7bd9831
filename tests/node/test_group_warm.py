"""Joiners that start together are given the hot blocks by one broadcast; when that fails, by reads of their own.

Nodes with gloo groups on this machine. A donor that pauses within a broadcast makes "in the middle" a place.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest

import kvshare
from kvshare import Settings, warm_group
from kvshare.directory_server import DirectoryServer
from kvshare.errors import ConfigError
from kvshare.places import GroupPlan
from kvshare.transport import nccl
from kvshare.transport.base import BlockStatus, ReadRequest, Transfer, failed
from kvshare.transport.group import announce
from kvshare.transport.group_frames import Rows
from kvshare.transport.group_source import RegionSource
from kvshare.warm_group import Part
from tests.node.conftest import BLOCK_BYTES, BLOCK_SIZE, SECRET, Cluster, Host, blocks_of, eventually

pytest.importorskip("torch", reason="groups need torch")

BLOCKS = 40
TOKENS = list(range(100, 100 + BLOCKS * BLOCK_SIZE))
PORTION_BLOCKS = 4
GROUPS = {"warm_group_ranks": 2, "warm_gather_seconds": 20.0}
PATIENCE = 60.0  # no working machine needs it


@pytest.fixture(autouse=True)
def small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "announce", partial(announce, portion_bytes=PORTION_BLOCKS * BLOCK_BYTES, seconds=2.0))


@pytest.fixture
def directory(cluster: Cluster) -> DirectoryServer:
    cluster.directory = DirectoryServer(Settings.load({"secret": SECRET, **GROUPS}, environ={}))
    cluster.directory.start()
    return cluster.directory


def counted(directory: DirectoryServer, name: str) -> int:
    return directory.status().counters.get(name, 0)


def give(directory: DirectoryServer, host: Host, locations: int = BLOCKS) -> None:
    """Save the hot blocks at a host, and wait until the directory knows them as hot."""
    with host.connect() as giver:
        assert giver.wait_warm(PATIENCE).done  # or it would ask for a group of its own when something is hot
        giver.save(TOKENS, blocks_of(TOKENS))
        assert eventually(lambda: giver.match(TOKENS) == len(TOKENS))
        assert eventually(lambda: counted(directory, "locations") == locations and counted(directory, "hot_keys") >= BLOCKS)


def holds_all(cache: kvshare.Cache) -> bool:
    """Has it all the hot blocks, with the right bytes?"""
    blocks = blocks_of(TOKENS)
    filled = np.zeros_like(blocks)
    return cache.load(TOKENS, filled) == len(TOKENS) and bool((filled == blocks).all())


def no_group_is_left() -> bool:
    """A donor has one group at a time."""
    return not any(thread.name == "kvshare-warm-group" for thread in threading.enumerate())


def no_single_reads(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(_: object, request: ReadRequest) -> Transfer:
        transfer = Transfer()
        transfer.complete(failed(request, BlockStatus.UNREACHABLE, "this test allows no single reads"))
        return transfer

    assert host.node is not None
    monkeypatch.setattr(host.node.transports, "read", read)


class Pause:
    """The donor's gathering of the fourth portion waits until the test goes on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.over = threading.Event(), threading.Event()
        pause = self

        class Source(RegionSource):
            def gather(self, start: int, stop: int, targets: npt.NDArray[np.uint64]) -> Rows:
                if start == 3 * PORTION_BLOCKS:
                    pause.reached.set()
                    assert pause.over.wait(PATIENCE)
                return super().gather(start, stop, targets)

        monkeypatch.setattr(nccl, "RegionSource", Source)


def test_joiners_that_attach_together_get_all_hot_blocks_from_one_broadcast(
    cluster: Cluster, directory: DirectoryServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, c = (cluster.host(name, **GROUPS).start() for name in "abc")
    give(directory, a)
    monkeypatch.setattr(warm_group, "BATCH_BYTES", 16 * BLOCK_BYTES)  # three broadcasts
    for joiner in (b, c):
        no_single_reads(joiner, monkeypatch)
    with b.connect() as one, c.connect() as two:
        for joiner in (one, two):
            state = joiner.wait_warm(PATIENCE)
            assert (state.done, state.wanted, state.pulled, state.donors) == (True, BLOCKS, BLOCKS, {"a": BLOCKS})
        assert counted(directory, "groups") == 1
        a.stop()  # nothing is needed from the donor any more
        assert holds_all(one) and holds_all(two)


def test_a_joiner_that_has_the_blocks_already_does_not_keep_them_from_the_others(
    cluster: Cluster, directory: DirectoryServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, c, d = (cluster.host(name, **GROUPS).start() for name in "abcd")
    give(directory, a)
    with b.connect() as one, c.connect() as two:
        assert one.wait_warm(PATIENCE).pulled == two.wait_warm(PATIENCE).pulled == BLOCKS
    assert eventually(lambda: counted(directory, "locations") == 3 * BLOCKS)
    assert eventually(no_group_is_left)
    for joiner in (c, d):
        no_single_reads(joiner, monkeypatch)
    with c.connect() as two, d.connect() as three:
        assert three.wait_warm(PATIENCE).pulled == BLOCKS
        assert two.wait_warm(PATIENCE).pulled == 0
        assert counted(directory, "groups") == 2
        assert holds_all(two) and holds_all(three)


def test_who_is_alone_is_not_kept_waiting_for_ever(cluster: Cluster) -> None:
    brief = {**GROUPS, "warm_gather_seconds": 0.2}
    cluster.directory = DirectoryServer(Settings.load({"secret": SECRET, **brief}, environ={}))
    cluster.directory.start()
    a, b = (cluster.host(name, **brief).start() for name in "ab")
    give(cluster.directory, a)
    with b.connect() as one:
        assert one.wait_warm(PATIENCE).pulled == BLOCKS
        assert counted(cluster.directory, "groups") == 0
        assert holds_all(one)


def test_a_joiner_killed_in_the_middle_leaves_the_other_to_single_reads(
    cluster: Cluster, directory: DirectoryServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause = Pause(monkeypatch)
    a, b = (cluster.host(name, **GROUPS).start() for name in "ab")
    c = cluster.host("c", **GROUPS).spawn()
    give(directory, a)
    with b.connect() as one:
        two = c.connect()
        assert pause.reached.wait(PATIENCE)
        c.kill()
        pause.over.set()
        state = one.wait_warm(PATIENCE)
        assert (state.done, state.pulled) == (True, BLOCKS)
        assert holds_all(one)
        two.close()
    c.spawn().stop()  # takes away what the killed one left behind


def test_a_joiner_stopped_in_the_middle_leaves_the_other_to_single_reads(
    cluster: Cluster, directory: DirectoryServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause = Pause(monkeypatch)
    a, b, c = (cluster.host(name, **GROUPS).start() for name in "abc")
    give(directory, a)
    with b.connect() as one, c.connect():
        assert pause.reached.wait(PATIENCE)
        c.stop()
        assert c.node is not None and c.node.join(PATIENCE)
        pause.over.set()
        assert one.wait_warm(PATIENCE).pulled == BLOCKS
        assert holds_all(one)


def test_a_donor_stopped_in_the_middle_leaves_all_to_single_reads_from_others(
    cluster: Cluster, directory: DirectoryServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause = Pause(monkeypatch)
    a, b, c = (cluster.host(name, **GROUPS).start() for name in "abc")
    d = cluster.host("d").start()
    give(directory, a)
    give(directory, d, 2 * BLOCKS)
    with b.connect() as one, c.connect() as two:
        assert pause.reached.wait(PATIENCE)
        stopping = threading.Thread(target=a.stop)
        stopping.start()
        assert eventually(lambda: "a" not in [node.node for node in directory.status().nodes])
        assert stopping.is_alive()  # its memory is being read
        pause.over.set()
        stopping.join()
        assert one.wait_warm(PATIENCE).pulled == two.wait_warm(PATIENCE).pulled == BLOCKS
        assert holds_all(one) and holds_all(two)


def test_a_donor_that_refuses_leaves_all_to_single_reads(
    cluster: Cluster, directory: DirectoryServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConfigError("cannot listen")

    monkeypatch.setattr(nccl, "announce", refuse)
    a, b, c = (cluster.host(name, **GROUPS).start() for name in "abc")
    give(directory, a)
    with b.connect() as one, c.connect() as two:
        assert one.wait_warm(PATIENCE).pulled == two.wait_warm(PATIENCE).pulled == BLOCKS
        assert counted(directory, "groups") == 0
        assert holds_all(one) and holds_all(two)


def test_a_donor_that_dies_leaves_all_to_single_reads_from_others(cluster: Cluster, directory: DirectoryServer) -> None:
    a = cluster.host("a", **GROUPS).spawn()
    b, c, d = (cluster.host(name, **changes).start() for name, changes in (("b", GROUPS), ("c", GROUPS), ("d", {})))
    give(directory, a)
    give(directory, d, 2 * BLOCKS)

    def first_kill(join: Callable[[GroupPlan], object]) -> Callable[[GroupPlan], object]:
        async def killing(plan: GroupPlan) -> Part:
            a.kill()
            return await join(plan)  # type: ignore[misc, no-any-return]

        return killing

    for host in (b, c):
        assert host.node is not None
        host.node.groups.join = first_kill(host.node.groups.join)  # type: ignore[method-assign, assignment]
    with b.connect() as one, c.connect() as two:
        assert one.wait_warm(PATIENCE).pulled == two.wait_warm(PATIENCE).pulled == BLOCKS
        assert counted(directory, "groups") == 1
        assert holds_all(one) and holds_all(two)
    a.spawn().stop()
