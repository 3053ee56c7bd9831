"""The traffic of `bench_recovery`: blocks saved and read back through a real session, until the node is gone; and all of them
read back once it is there again.

A block is a number: its key ends with it, its bytes follow from it (`overwriter.content`), so every byte that is accepted can
be told right or wrong. Numbers count on within a chain, whose blocks are saved in order.

`Ledger` is a connection of its own. It hears what the node tells of its arena down to the last word of one that was killed, and
has the node say now and then what it counts.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future

import numpy as np
from overwriter import content

from kvshare import keys, native
from kvshare.channel import Answer, Channel, Pushed
from kvshare.config import Settings
from kvshare.errors import Unavailable
from kvshare.keys import Namespace
from kvshare.messages import PROTOCOL_VERSION, AskStatus, Attach, Attached, Dropped, Indexed, NodeStatus
from kvshare.mover import Mover
from kvshare.places import Stored
from kvshare.saving import SaveJob
from kvshare.session import Session
from kvshare.transport.base import BlockStatus, Targets

CHAIN_BLOCKS_MAX = 24
CHAIN_NUMBERS = 32  # from one chain's first number to the next one's
BLOCKS_MAX = 720  # saved in one round
JOBS_MAX = 3  # on their way into the arena at once
PAUSE_SECONDS_MAX = 0.02
STATUS_SECONDS = 0.02
OVER_SECONDS = 20.0  # for a read, or for a save to be done or dropped
TRIES = 4  # a block that was promoted may be evicted before it is loaded
HASH_BYTES = 8

SPACE = Namespace(
    weights="bench_recovery", dtype="bf16", kv_dtype="bf16", block_size=16, page_bytes=4096, layers=1, kv_heads=1,
    head_size=64, hash_algorithm="numbers", hash_seed="", packing="bench",
)  # fmt: skip
PREFIX = keys.prefix(SPACE.family())


def key_of(number: int) -> bytes:
    return PREFIX + number.to_bytes(HASH_BYTES, "big")


def number_of(key: bytes) -> int | None:
    """The number of a key of ours; None for any other bytes."""
    if keys.prefix_of(key) != PREFIX or len(key) != len(PREFIX) + HASH_BYTES:
        return None
    return int.from_bytes(keys.hash_of(key), "big")


class Ledger:
    """What the node has told. held: its arena's blocks by number; counters: as it counted them when it was asked last. Raises
    Unavailable."""

    def __init__(self, settings: Settings, block_bytes: int) -> None:
        self.held: dict[int, Stored] = {}
        self.counters: dict[str, int] = {}
        self._over = threading.Event()
        self._asked: Future[Answer] | None = None
        self._asked_at = 0.0
        self._channel = Channel(
            settings.socket_path, settings.message_bytes_max, self._told, lambda _: self._over.set(), settings.attach_seconds
        )
        attach = self._channel.ask(
            lambda ask: Attach(ask, PROTOCOL_VERSION, "ledger", SPACE, block_bytes, True, False, keys.NO_TENANT)
        )
        if not isinstance(attach.result(settings.attach_seconds), Attached):
            raise Unavailable("the node does not let us attach")

    @property
    def over(self) -> bool:
        """Is the node gone, and its last word heard?"""
        return self._over.is_set()

    def wait_over(self) -> None:
        if not self._over.wait(OVER_SECONDS):
            raise Unavailable("the node has ended, its connection has not")

    def ask(self) -> None:
        """Have the node count, unless it has just been asked. Does not wait."""
        now = time.monotonic()
        if (self._asked is None or self._asked.done()) and now - self._asked_at >= STATUS_SECONDS:
            self._asked_at = now
            self._asked = self._channel.ask(AskStatus)
            self._asked.add_done_callback(self._counted)

    def close(self) -> None:
        self._channel.close()

    def _counted(self, asked: Future[Answer]) -> None:
        if asked.exception() is None and isinstance(answer := asked.result(), NodeStatus):
            self.counters = dict(answer.counters)

    def _told(self, message: Pushed) -> None:
        if isinstance(message, Indexed):
            for block in message.stored:
                number = number_of(block.key)
                assert number is not None
                self.held[number] = block
        elif isinstance(message, Dropped):
            for key in message.keys:
                self.held.pop(number_of(key) or -1, None)


class Traffic:
    """A session's saves and reads. wrong: numbers of blocks that were accepted with a wrong byte, one for each time.

    chance: what is done, in which order, follows from it. Raises Unavailable.
    """

    def __init__(self, settings: Settings, block_bytes: int, chance: random.Random) -> None:
        self.wrong: list[int] = []
        self.accepted = 0
        self._chance = chance
        self._length = block_bytes
        self._chains: list[range] = []
        self._memory = np.zeros((CHAIN_NUMBERS, block_bytes), np.uint8)
        self._saving: list[tuple[SaveJob, np.ndarray]] = []
        self._session = Session.connect(settings, SPACE, engine="traffic", block_bytes=block_bytes)
        self._mover = Mover(self._session)

    def run(self, ledger: Ledger) -> list[range]:
        """Save and read until the node is gone; what was saved or tried to, as chains of numbers."""
        saved = 0
        while not ledger.over:
            ledger.ask()
            if saved < BLOCKS_MAX and (not self._chains or self._chance.random() < 0.6):
                saved += self._save()
            else:
                chain = self._chance.choice(self._chains)
                self.load(chain[: self._chance.randint(1, len(chain))], told=True)
            if self._chance.random() < 0.5:
                time.sleep(self._chance.uniform(0, PAUSE_SECONDS_MAX))
        self._settle(0)
        return self._chains

    def read_back(self, wanted: Iterable[int], *, once: bool = False) -> set[int]:
        """Read these; returns those that came. Those that do not come are asked for again, unless ``once``."""
        left, came = sorted(wanted), set[int]()
        for attempt in range(1 if once else TRIES):
            for chain in _runs(left, 1 if attempt else CHAIN_NUMBERS):
                came.update(self.load(chain))
            left = [number for number in left if number not in came]
            if not left:
                break
        return came

    def load(self, chain: range, *, told: bool = False) -> list[int]:
        """Leading blocks of ``chain`` that are to be had, verified; those that arrived. ``told``: the node hears that they were
        of use, which may make it write them to its disk."""
        question = self._session.ask(PREFIX, [number.to_bytes(HASH_BYTES, "big") for number in chain])
        while (count := question.available(0)) is None:
            time.sleep(0.0005)  # bounded: `available` answers by its deadline
        if told:
            question.close(count)
        if not count:
            return []
        self._memory.fill(0xEE)
        targets = Targets.strided(native.address_of(self._memory), self._length, np.arange(count), self._length)
        completion = self._mover.load(question.plan(0, count), targets).wait(OVER_SECONDS)
        if completion is None:
            raise TimeoutError("a read hangs")
        arrived = [chain[i] for i in np.flatnonzero(completion.statuses == BlockStatus.OK).tolist()]
        for number in arrived:
            if not np.array_equal(self._memory[number - chain.start], content(number, self._length)):
                self.wrong.append(number)
        self.accepted += len(arrived)
        return arrived

    def close(self) -> None:
        self._mover.close()
        self._session.close()

    def __enter__(self) -> Traffic:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _save(self) -> int:
        """Begin to save a new chain, whole or cut in two."""
        self._settle(JOBS_MAX - 1)
        first = (len(self._chains) + 1) * CHAIN_NUMBERS
        chain = range(first, first + self._chance.randint(1, CHAIN_BLOCKS_MAX))
        self._chains.append(chain)
        blocks = np.stack([content(number, self._length) for number in chain])
        cut = self._chance.randint(0, len(chain))
        for part in (range(cut), range(cut, len(chain))):
            if part:
                sources = Targets.strided(native.address_of(blocks), self._length, np.array(part), self._length)
                self._saving.append((self._mover.save([key_of(chain[i]) for i in part], sources), blocks))
        return len(chain)

    def _settle(self, jobs: int) -> None:
        """Wait until so many saves are under way at most."""
        while len(self._saving) > jobs:
            job, _ = self._saving[0]
            if not job.wait(OVER_SECONDS):
                raise TimeoutError("a save hangs")
            self._saving.pop(0)


def _runs(numbers: list[int], longest: int) -> Iterator[range]:
    """``numbers`` (ascending) as ranges of neighbours, none longer than ``longest`` or over the end of a chain."""
    start = 0
    for at in range(1, len(numbers) + 1):
        last = at == len(numbers) or numbers[at] != numbers[at - 1] + 1 or at - start >= longest
        if last or numbers[at] % CHAIN_NUMBERS == 0:
            yield range(numbers[start], numbers[at - 1] + 1)
            start = at
