"""How much one directory carries: the state machine with its index, with decoding and encoding.

Figures without bars: they say when it is time for another shard; `bench_index.py` has the index by itself. One thread, in this
process, no sockets. Every figure is the median of several rounds over the same filled directory; memory is what the
process grew by while it was filled.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from common import arguments, report

from kvshare import keys
from kvshare.cluster_messages import AskPlan, Find, Join, Publish, Report, ToDirectory
from kvshare.config import Settings
from kvshare.directory import Directory
from kvshare.directory_events import Connected, Heard, Send
from kvshare.fingerprints import ALL_PARTS
from kvshare.messages import PROTOCOL_VERSION, Message
from kvshare.places import NodeDescription, Stored
from kvshare.runs import Seen, keys_of, runs_of

NODES = 32
BATCH_BLOCKS = 4096  # of a publish, as a node sends them
FIND_KEYS = 8192  # a prompt of 128k tokens at 16 a block
LENGTH = 2 << 20
FAMILY = bytes(range(keys.FAMILY_BYTES))


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def frames(blocks: int, names: list[bytes], source: random.Random) -> Iterator[tuple[str, bytes]]:
    """Encoded publishes in which every node stores its share of ``names``: decoding gives each its own objects."""
    encode = msgspec.msgpack.encode
    sequences = dict.fromkeys(range(NODES), 0)
    for batch, start in enumerate(range(0, blocks, BATCH_BLOCKS)):
        node = batch % NODES
        sequences[node] += 1
        anew = ALL_PARTS if sequences[node] == 1 else 0
        stored = [
            Stored(key, LENGTH, start + i, (7 << 32) + 2 * source.getrandbits(31), LENGTH)
            for i, key in enumerate(names[start : start + BATCH_BLOCKS])
        ]
        yield f"n{node}", encode(Publish(f"n{node}", 1, sequences[node], anew, False, runs_of(stored), [], 0))


def timed(action: Callable[[], object], rounds: int) -> float:
    """Median seconds of ``rounds`` runs."""
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        action()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


class Fixture:
    """A directory with nodes that joined, driven as the server drives it: frames in, frames out."""

    def __init__(self, blocks: int) -> None:
        self.directory = Directory(Settings.load({"index_keys_max": blocks}, {}))
        self.decoder = msgspec.msgpack.Decoder(ToDirectory)
        for number in range(NODES):
            self.directory.handle(Connected(number), 0.0)
            node = NodeDescription(f"n{number}", 1, f"h{number}", "10.0.0.1:1", ())
            self.hear(number, msgspec.msgpack.encode(Join(PROTOCOL_VERSION, node, False, 0, 1)))

    def hear(self, number: int, frame: bytes) -> int:
        """Bytes of the answers."""
        commands = self.directory.handle(Heard(number, self.decoder.decode(frame)), 0.0)
        return sum(len(msgspec.msgpack.encode(command.message)) for command in commands if isinstance(command, Send))

    def ask(self, message: Message) -> Callable[[], int]:
        frame = msgspec.msgpack.encode(message)
        return lambda: self.hear(NODES - 1, frame)


def bench_directory(
    publishes: list[tuple[str, bytes]], names: list[bytes], rounds: int, source: random.Random
) -> dict[str, float]:
    gc.collect()
    fixture = Fixture(len(names))
    before = resident_bytes()
    taken = timed(lambda: [fixture.hear(int(node[1:]), frame) for node, frame in publishes], 1)
    grown = resident_bytes() - before
    start = source.randrange(len(names) - FIND_KEYS)
    find = timed(fixture.ask(Find(1, keys_of(names[start : start + FIND_KEYS]))), 5 * rounds)  # a prompt's blocks came together
    chains = [Seen(keys_of(names[start : start + 256])[0]) for start in range(0, 1 << 17, 256)]
    hot = timed(fixture.ask(Report(chains)), rounds)
    plan = timed(fixture.ask(AskPlan(1, FAMILY, keys.NO_TENANT, 1024 * LENGTH, 30.0, False, {})), rounds)
    assert fixture.directory.status().keys == len(names)
    return {
        "directory_publishes": len(names) / taken,
        "directory_finds": FIND_KEYS / find,
        "directory_find_128k_ms": find * 1e3,
        "directory_reports": sum(len(chain.keys) for chain in chains) / hot,
        "directory_plan_ms": plan * 1e3,
        "directory_bytes_per_block": grown / len(names),
    }


UNITS = {"ms": "ms", "block": "bytes"}


def main() -> None:
    options = arguments(__doc__ or "")
    blocks, rounds = (1 << 18, 2) if options.quick else (1 << 20, 5)
    source = random.Random(1)
    prefix = keys.prefix(FAMILY)
    names = [prefix + source.randbytes(32) for _ in range(blocks)]
    publishes = list(frames(blocks, names, source))
    figures = bench_directory(publishes, names, rounds, source)
    detail = {"blocks": blocks, "nodes": NODES, "batch_blocks": BATCH_BLOCKS, "find_keys": FIND_KEYS, "rounds": rounds}
    report(
        {name: (value, UNITS.get(name.rsplit("_", 1)[-1], "blocks/s")) for name, value in figures.items()}, detail, options.json
    )


if __name__ == "__main__":
    main()
