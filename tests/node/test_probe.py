"""A node measures the peers that its answers name, in the background, and says what it knows of them; a load from one that
is slower than computing ends early."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from kvshare import keys, native
from kvshare.messages import Located
from kvshare.mover import Mover
from kvshare.question import Asked, Question
from kvshare.session import Session
from kvshare.transport.base import BlockStatus, Targets
from tests.node.conftest import BLOCK_BYTES, BLOCK_SIZE, SPACE, Cluster, Host, blocks_of, eventually

TOKENS = list(range(100, 100 + 40 * BLOCK_SIZE))
PREFIX = keys.prefix(SPACE.family(), keys.variant(b"", ""))
HASHES = keys.chain(TOKENS, BLOCK_SIZE)
LONG_TOKENS = list(range(1000, 1000 + 400 * BLOCK_SIZE))
LONG = keys.chain(LONG_TOKENS, BLOCK_SIZE)  # 3.3 MB
SLOW = 10**6  # bytes/s


def asked(session: Session, patience_seconds: float, hashes: list[bytes] = HASHES) -> Located | None:
    """The node's answer about these blocks."""
    answers: list[Located | None] = []
    arrived = threading.Event()

    def answer(located: Located | None) -> None:
        answers.append(located)
        arrived.set()

    assert session.locate(Asked([PREFIX + one for one in hashes], patience_seconds, 0.0), answer, lambda _: None)
    assert arrived.wait(10.0)
    return answers[0]


def filled(cluster: Cluster, *names: str, **changes: object) -> list[Host]:
    """Hosts that hold the blocks of `TOKENS`."""
    hosts = [cluster.host(name, warm_bytes=0, **changes).start() for name in names]
    for host in hosts:
        with host.connect() as giver:
            giver.save(TOKENS, blocks_of(TOKENS))
    assert eventually(lambda: cluster.directory is not None
                      and cluster.directory.status().counters["locations"] == len(HASHES) * len(names))  # fmt: skip
    return hosts


def slow(cluster: Cluster) -> np.ndarray:
    """A host that holds the blocks of `LONG` behind a slow link; their bytes."""
    blocks = blocks_of(LONG_TOKENS)
    host = cluster.host("a", warm_bytes=0, arena_chunk_bytes=4 << 20, tcp_bytes_per_second=SLOW).start()
    with host.connect() as giver:
        assert giver.save(LONG_TOKENS, blocks) == len(LONG)
    assert eventually(lambda: cluster.directory is not None and cluster.directory.status().keys == len(LONG))
    return blocks


@contextmanager
def attached(host: Host) -> Iterator[Session]:
    """A session of a node that has heard of its peers."""
    node = host.node
    assert node is not None and eventually(lambda: node.link.connected and node.memory.peers)
    session = Session.connect(host.settings, SPACE, engine="test", block_bytes=BLOCK_BYTES)
    try:
        yield session
    finally:
        session.close()


def test_an_answer_waits_for_the_first_measurement_of_the_peer_that_it_names(cluster: Cluster) -> None:
    cluster.start_directory()
    filled(cluster, "a")
    with attached(cluster.host("b", warm_bytes=0).start()) as session:
        located = asked(session, 10.0)
        assert located is not None and all(located.locations)
        assert [peer.node for peer in located.peers] == ["a"]
        assert len(located.rates) == 1 and located.rates[0] > 0


def test_who_has_no_patience_is_answered_without_a_rate(cluster: Cluster) -> None:
    cluster.start_directory()
    filled(cluster, "a")
    with attached(cluster.host("b", warm_bytes=0).start()) as session:
        located = asked(session, 0.0)
        assert located is not None and all(located.locations) and located.rates == [0.0]


def test_a_peer_that_takes_longer_than_the_patience_is_named_without_a_rate_and_measured_later(cluster: Cluster) -> None:
    cluster.start_directory()
    slow(cluster)
    with attached(cluster.host("b", warm_bytes=0).start()) as session:
        located = asked(session, 0.01, LONG)
        assert located is not None and all(located.locations) and located.rates == [0.0]
        located = asked(session, 10.0, LONG)
        assert located is not None and 0 < located.rates[0] < 10 * SLOW


def test_a_slow_source_is_left_for_a_faster_one(cluster: Cluster) -> None:
    cluster.start_directory()
    filled(cluster, "a", "b")
    host = cluster.host("c", warm_bytes=0).start()
    assert host.node is not None
    for slow, fast in (("a", "b"), ("b", "a")):
        rates = host.node.prober.rates
        for name, rate in ((slow, 10**6), (fast, 10**9)):
            rates.forget(name)
            rates.observe((name, "host"), rate, 1.0, time.monotonic())
        with attached(host) as session:
            located = asked(session, 1.0)
            assert located is not None
            assert {place.node for place in located.locations if place is not None} == {fast}
            assert [peer.node for peer in located.peers] == [fast] and located.rates[0] > 10**8


def test_a_question_offers_what_its_node_has_measured(cluster: Cluster) -> None:
    cluster.start_directory()
    filled(cluster, "a")
    with attached(cluster.host("b", warm_bytes=0, lookup_seconds=20.0).start()) as session:
        question = Question(session, PREFIX, HASHES, 10.0)
        assert eventually(lambda: question.available(0) == len(HASHES))
        offer = question.offer(0, len(HASHES))
        assert offer.own and offer.sources == [("b", "host"), ("a", "host")]
        assert offer.source.tolist() == [1] * len(HASHES) and offer.rates[1] > 0
        assert question.plan(0, len(HASHES)).reads[0].source == ("a", "host")


def test_a_warm_plan_measures_its_donors(cluster: Cluster) -> None:
    cluster.start_directory()
    (giver,) = filled(cluster, "a")
    with giver.connect() as cache:
        for _ in range(3):
            assert cache.match(TOKENS) == len(TOKENS)  # hot
        later = list(range(5000, 5000 + 8 * BLOCK_SIZE))
        cache.save(later, blocks_of(later))
    # What was looked up is told before what was saved later.
    assert eventually(lambda: cluster.directory is not None and cluster.directory.status().keys == len(HASHES) + 8)
    host = cluster.host("b").start()
    with host.connect() as joiner:
        assert joiner.wait_warm(20.0).pulled == len(HASHES)
        assert host.node is not None and host.node.prober.rates.rate(("a", "host"), time.monotonic()) > 0


def test_a_load_over_a_link_slower_than_computing_ends_early_and_keeps_what_has_arrived(cluster: Cluster) -> None:
    """It would take three seconds, and may take two."""
    cluster.start_directory()
    blocks = slow(cluster)
    with attached(cluster.host("b", warm_bytes=0, lookup_seconds=20.0).start()) as session:
        mover = Mover(session)
        try:
            question = Question(session, PREFIX, LONG)
            assert eventually(lambda: question.available(0) == len(LONG))
            plan = replace(question.plan(0, len(LONG)), seconds=0.5, grace_seconds=1.5)
            filled = np.zeros_like(blocks)
            targets = Targets.strided(native.address_of(filled), BLOCK_BYTES, np.arange(len(LONG)), BLOCK_BYTES)
            completion = mover.load(plan, targets).wait(20.0)
            assert completion is not None and "slower than computing" in completion.error
            arrived = completion.statuses == BlockStatus.OK
            assert 0 < arrived.sum() < len(LONG) and (filled[arrived] == blocks[arrived]).all()
            assert [read.source for read in mover.measured() if read.slow] == [("a", "host")]
        finally:
            mover.close()
