"""Blocks pulled out of a working engine's own KV cache, which evicts and overwrites them as it likes: no wrong block is ever
accepted, and a joiner says the same with them as without."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from kvshare import keys
from kvshare.config import Settings
from kvshare.directory_server import DirectoryServer
from kvshare.integrations.testing import engine_arguments
from kvshare.loading import LoadPlan, SourceRead
from kvshare.messages import Locate, Located
from kvshare.mover import Mover
from kvshare.node import Node
from kvshare.places import DEVICE, Location, RegionDescription
from kvshare.session import Session
from kvshare.transport.base import BlockStatus, Targets
from tests.vllm.conftest import EngineChild, House, eventually, prompt, real_model

pytestmark = pytest.mark.vllm

BLOCK, BLOCKS = 128, 5
CACHE_BLOCKS = 24  # of the donor: three prompts and what runs
PROMPTS = [prompt(100 + seed, BLOCKS * BLOCK + 9) for seed in range(12)]
ARGUMENTS = {"load_format": "auto", "max_model_len": 1024, "max_num_batched_tokens": 512}
READS = 3000
CHANGED = {"secret": "a secret of the tests", "warm_bytes": 0}


class Site:
    """A directory and two nodes on this host: the donor's, and one that reaches nothing but other processes' memory."""

    def __init__(self, house: House) -> None:
        self.directory = DirectoryServer(Settings.load({**CHANGED, "port": 0}, environ={}))
        self.directory.start()
        base = dataclasses.replace(house.settings, directory=self.directory.endpoint, **CHANGED)
        self.donor = dataclasses.replace(base, node_name="donor")
        self.joiner = dataclasses.replace(base, node_name="joiner", transports=("process",))
        self.nodes = [Node(self.donor), Node(self.joiner)]
        for node in self.nodes:
            node.start()

    def close(self) -> None:
        problems = [problem for node in self.nodes for problem in node.check()]
        for node in self.nodes:
            node.stop()
        self.directory.stop()
        assert problems == []

    @staticmethod
    def given(settings: Settings) -> dict[str, object]:
        default, values = Settings.load({}, environ={}), dataclasses.asdict(settings)
        return {name: value for name, value in values.items() if value != getattr(default, name)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return real_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def site(house: House) -> Iterator[Site]:
    made = Site(house)
    yield made
    made.close()


@pytest.fixture(scope="module")
def donor(site: Site, house: House, model: str) -> EngineChild:
    """An engine with processes of its own, as `vllm serve` has, and a small KV cache."""
    child = house.child("donor")
    child.start(engine_arguments(model, num_gpu_blocks_override=CACHE_BLOCKS, **ARGUMENTS), site.given(site.donor))
    return child


class Reader:
    """Reads blocks out of the donor's KV cache, and knows from the donor's arena what they must be."""

    def __init__(self, site: Site) -> None:
        (namespace,) = site.nodes[0].namespaces.values()
        (arena,) = site.nodes[0].memory.arenas.values()
        self.block_bytes = int(arena.headers["length"].max())
        self.prefix = keys.prefix(namespace.family())
        self.truth = Session.connect(site.donor, namespace, engine="truth", block_bytes=self.block_bytes)
        self.session = Session.connect(site.joiner, namespace, engine="reader", block_bytes=self.block_bytes)
        self.known: dict[bytes, bytes] = {}
        self.movers = [Mover(self.truth), Mover(self.session)]
        self.memory = np.zeros((BLOCKS, self.block_bytes), np.uint8)
        self.seen: Counter[str] = Counter()

    def close(self) -> None:
        for mover in self.movers:
            mover.close()
        self.truth.close()
        self.session.close()

    def learn(self) -> list[bytes]:
        """What the donor's arena holds, verified by checksum. Returns the keys."""
        fresh = [key for key in self.truth._index.by_prefix.get(self.prefix, {}) if key not in self.known]
        for start in range(0, len(fresh), BLOCKS):
            hashes = fresh[start : start + BLOCKS]
            question = self.truth.ask(self.prefix, hashes)
            plan = question.plan(0, len(hashes))
            self._load(self.movers[0], plan)
            self.known |= {block_hash: self.memory[i].tobytes() for i, block_hash in enumerate(hashes)}
        return list(self.known)

    def where(self, hashes: list[bytes]) -> list[tuple[bytes, Location, RegionDescription]]:
        """Which of these the donor's engine has now, by what our node knows."""
        answer = self.session.call(lambda ask: Locate(ask, [self.prefix + one for one in hashes], 0.0, 0.0), 5.0)
        assert isinstance(answer, Located)
        regions = {(region.node, region.region): region for region in answer.peers}
        found = zip(hashes, answer.locations, strict=True)
        told = [(one, place, regions[place.node, place.region]) for one, place in found if place is not None]
        return [one for one in told if one[2].kind == DEVICE]  # the joiner of another test left some in our node's arena

    def read(self, told: list[tuple[bytes, Location, RegionDescription]]) -> None:
        """Read them in one go; whatever is accepted must be what its key says."""
        region = told[0][2]
        reads = SourceRead(
            region, np.arange(len(told)), np.array([place.slot for _, place, _ in told], np.int64),
            np.array([place.generation for _, place, _ in told], np.uint64),
        )  # fmt: skip
        statuses = self._load(self.movers[1], LoadPlan(self.prefix, [one for one, _, _ in told], [reads]))
        for i, (block_hash, _, _) in enumerate(told):
            self.seen[BlockStatus(int(statuses[i])).name] += 1
            if statuses[i] == BlockStatus.OK:
                assert self.memory[i].tobytes() == self.known[block_hash]

    def _load(self, mover: Mover, plan: LoadPlan) -> np.ndarray:
        targets = Targets.strided(self.memory.ctypes.data, self.block_bytes, np.arange(len(plan)), self.block_bytes)
        completion = mover.load(plan, targets).wait()
        assert completion is not None
        return completion.statuses


@pytest.fixture
def reader(site: Site, donor: EngineChild) -> Iterator[Reader]:
    donor.generate(*PROMPTS)
    assert eventually(lambda: sum(len(store) for store in site.nodes[0].memory.stores.values()) >= len(PROMPTS) * BLOCKS)
    made = Reader(site)
    assert eventually(lambda: len(made.learn()) >= len(PROMPTS) * BLOCKS)
    yield made
    made.close()


def test_a_joiner_takes_blocks_from_a_working_engine_and_says_the_same(
    site: Site, donor: EngineChild, child: EngineChild, model: str
) -> None:
    expected = donor.generate(PROMPTS[0], tokens=16)[0]
    assert eventually(lambda: len(site.nodes[0].exposed) == 1 and sum(map(len, site.nodes[0].exposed.values())) >= BLOCKS)
    child.start(engine_arguments(model, **ARGUMENTS), site.given(site.joiner))
    child.ask("loaded")
    got = child.generate(PROMPTS[0], tokens=16)[0]
    assert got["cached"] == BLOCKS * BLOCK and got["tokens"] == expected["tokens"]
    assert got["logprobs"] == pytest.approx(expected["logprobs"], abs=0.08)  # other chunks are computed: bfloat16
    (said,) = child.said("device region")
    assert "over process" in said
    child.stop()


def test_blocks_overwritten_under_the_reader_are_misses_and_never_wrong(donor: EngineChild, reader: Reader) -> None:
    """The donor goes through prompts that its cache cannot hold; the reader reads what it was told, now and long ago."""
    chance, told = random.Random(5), []
    hashes = list(reader.known)
    donor.tell("generate", prompts=[chance.choice(PROMPTS) for _ in range(60)], tokens=2)

    def enough() -> bool:
        # On a busy machine the donor may get little done while we read: longer then, but not for ever.
        reads = sum(reader.seen.values())
        return reads >= READS and (min(reader.seen["OK"], reader.seen["STALE"]) > 100 or reads >= 20 * READS)

    while not enough():
        told += reader.where(chance.sample(hashes, 20))
        told = told[-400:]
        for _ in range(8):
            if told:
                reader.read(chance.sample(told, min(BLOCKS, len(told))))
    assert reader.seen["OK"] > 100 and reader.seen["STALE"] > 100, reader.seen
    assert not reader.seen["UNREACHABLE"], reader.seen
    donor.answer()


def test_a_donor_killed_in_the_middle_is_a_miss_at_once(site: Site, donor: EngineChild, reader: Reader) -> None:
    told = reader.where(list(reader.known))
    assert told
    donor.tell("generate", prompts=PROMPTS, tokens=2)
    pids = {region.memory.pid for _, _, region in told if region.memory is not None}
    chance = random.Random(6)

    def read() -> int:
        reader.read(chance.sample(told, min(BLOCKS, len(told))))
        return reader.seen["UNREACHABLE"]

    for _ in range(20):
        assert read() == 0
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert eventually(read), "until the kernel has taken the process apart its memory is there, and right"
    assert eventually(lambda: not site.nodes[0].exposed), "the engine ends without its worker, its node forgets it"
    assert eventually(lambda: not reader.where(list(reader.known))), "and so does everybody else"
