"""A prompt of 128k tokens looked up in the directory of a Ray cluster, over the actor's own empty round trip.

The directory is the actor that `kvshare.integrations.ray.start` makes, on a Ray cluster of this script's own, filled with
`MEMBERSHIPS` of one node. A lookup is what a node does: 8,192 keys packed, encoded and sent over its connection to the actor's
process, the answer received and decoded. The empty round trip is a call of a method of the same actor that returns a string.
Both take turns; the figure is the ratio of their medians. For comparison the detail has an empty lookup over the connection.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import ray
from common import arguments, report, summary
from index_trace import run_of_blocks

from kvshare import actors, wire
from kvshare.cluster_messages import PURPOSE, Find, Found, FromDirectory, Join, Publish, Resync
from kvshare.fingerprints import ALL_PARTS
from kvshare.integrations.ray import cluster
from kvshare.messages import PROTOCOL_VERSION, Message
from kvshare.places import NodeDescription, RegionDescription
from kvshare.runs import Keys, Run, count_of, keys_of

NAME = "bench-actor"
MEMBERSHIPS = 4 << 20
PROMPT_BLOCKS = 8192
BLOCK_BYTES = 1 << 20
REGION = 7
FRAME_BYTES_MAX = 64 << 20


class Connection:
    """A node's connection to the directory, without a node."""

    def __init__(self, endpoint: str, secret: str, name: str) -> None:
        self._socket: socket.socket = wire.connect_tcp(endpoint, secret, PURPOSE, 10.0)
        self._socket.settimeout(60.0)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromDirectory)
        region = RegionDescription(name, REGION, BLOCK_BYTES, 1 << 24, f"host of {name}", "", "", "10.0.0.1:1")
        node = NodeDescription(name, 1, region.host_id, "10.0.0.1:1", (region,))
        self.send(Join(PROTOCOL_VERSION, node, False, 0, 1))
        while not isinstance(self.receive(), Resync):
            pass

    def send(self, message: Message) -> None:
        wire.send_frame(self._socket, self._encoder.encode(message))

    def receive(self) -> Any:
        return self._decoder.decode(wire.receive_frame(self._socket, FRAME_BYTES_MAX))

    def find(self, keys: list[Keys]) -> Found:
        self.send(Find(1, keys))
        while not isinstance(answer := self.receive(), Found):
            pass
        return answer

    def close(self) -> None:
        self._socket.close()


def chain(number: int) -> Run:
    first = (1 << 40) + number * PROMPT_BLOCKS
    run = run_of_blocks(np.arange(first, first + PROMPT_BLOCKS, dtype=np.uint64), 0)
    return msgspec.structs.replace(run, region=REGION, length=BLOCK_BYTES)


def fill(holder: Connection, asker: Connection, chains: int) -> None:
    for number in range(chains):
        anew = 0 if number else ALL_PARTS
        holder.send(Publish("holder", 1, number, anew, number + 1 < chains, [chain(number)], [], 0))
    while asker.find(keys_of(list(chain(chains - 1).keys)[-1:])).places.counts != b"\1":
        time.sleep(0.1)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(rounds: int, memberships: int) -> tuple[float, dict[str, Any]]:
    secret = secrets.token_hex(16)
    chains = memberships // PROMPT_BLOCKS
    with cluster.start(cluster=NAME, secret=secret, index_keys_max=2 * memberships) as running:
        actor = ray.get_actor(actors.directory_name(NAME), actors.NAMESPACE)
        endpoint = ray.get(actor.endpoint.remote())
        holder, asker = (Connection(endpoint, secret, name) for name in ("holder", "asker"))
        asker.send(Publish("asker", 1, 0, ALL_PARTS, False, [], [], 0))
        fill(holder, asker, chains)
        keys = [list(chain(number).keys) for number in np.random.default_rng(1).integers(0, chains, rounds).tolist()]
        samples: dict[str, list[float]] = {"lookup": [], "empty call": [], "empty lookup": []}

        def look_up(wanted: list[bytes]) -> None:
            packed = keys_of(wanted)
            assert count_of(packed) == PROMPT_BLOCKS
            assert asker.find(packed).places.counts == b"\1" * PROMPT_BLOCKS

        for wanted in keys:
            samples["lookup"].append(seconds(lambda wanted=wanted: look_up(wanted)))  # type: ignore[misc]
            samples["empty call"].append(seconds(lambda: ray.get(actor.endpoint.remote())))
            samples["empty lookup"].append(seconds(lambda: asker.find([])))
        known = running.status().keys
        holder.close()
        asker.close()
    assert known >= chains * PROMPT_BLOCKS
    detail: dict[str, Any] = {f"{name}, ms": summary([1e3 * each for each in found]) for name, found in samples.items()}
    ratio = float(np.median(samples["lookup"]) / np.median(samples["empty call"]))
    return ratio, detail | {"keys": known, "prompt_blocks": PROMPT_BLOCKS}


def main() -> None:
    options = arguments(__doc__ or "")
    rounds, memberships = (50, 1 << 18) if options.quick else (300, MEMBERSHIPS)
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        ratio, detail = measure(rounds, memberships)
    finally:
        ray.shutdown()
    report({"actor_lookup_128k_over_call": (ratio, "ratio")}, detail, options.json)


if __name__ == "__main__":
    main()
