"""What the scheduler's half tells the worker's half, and what that says at the start. Travels within one engine only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats

from kvshare.keys import Namespace
from kvshare.loading import LoadPlan, Measured
from kvshare.messages import Expose


@dataclass(frozen=True)
class Load:
    """Block i of ``plan`` goes to block ``block_ids[i]`` of the KV cache, for a request that waits for it."""

    request_id: str
    plan: LoadPlan
    block_ids: list[int]
    epoch: int  # of the weights: a load begun before `reset_cache` is worthless after it


@dataclass(frozen=True)
class Save:
    """Blocks that are complete once this step has run: keys, and where they are."""

    keys: list[bytes]
    block_ids: list[int]


@dataclass
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """One step. ``overwritten``: blocks that this step, or a load begun in it, may write first."""

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    overwritten: list[int] = field(default_factory=list)
    forward: bool = False
    epoch: int = 0

    def __reduce__(self) -> Any:
        """What nearly all steps say travels by its name, in a microsecond instead of ten."""
        return "NOTHING" if self is NOTHING else super().__reduce__()


NOTHING = StepMetadata(forward=True)  # nothing to do in this step: one object, never changed


@dataclass
class Hello(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """A worker knows the KV cache's layout, hence the namespaces: one for each shard of a block, in all ranks the same.
    ``block_bytes``: of a shard. ``offers``: shard -> this rank's part of the cache as a device region; empty when peers cannot
    read it where it lies."""

    namespaces: list[Namespace]
    block_bytes: int
    offers: dict[int, Expose] = field(default_factory=dict)


@dataclass
class Reads(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What the worker tells the scheduler's half after a step: how fast its sources were."""

    measured: list[Measured]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Reads:
        assert isinstance(other, Reads)
        return Reads(self.measured + other.measured)


COUNTERS = ("blocks_loaded", "bytes_loaded", "blocks_failed", "blocks_saved")


@dataclass
class TransferStats(KVConnectorStats):  # type: ignore[misc]
    """Counts of one interval, logged by vLLM as "KV Transfer metrics"."""

    @classmethod
    def of(cls, data: dict[str, Any] | None) -> TransferStats:
        return cls(data={name: (data or {}).get(name, 0) for name in COUNTERS})

    def reset(self) -> None:
        self.data = dict.fromkeys(COUNTERS, 0)

    def add(self, name: str, value: int) -> None:
        self.data[name] += value

    def aggregate(self, other: KVConnectorStats) -> TransferStats:
        for name in COUNTERS:
            self.data[name] += other.data.get(name, 0)
        return self

    def reduce(self) -> dict[str, int | float]:
        return {name: self.data[name] for name in COUNTERS}

    def is_empty(self) -> bool:
        return not any(self.data.get(name) for name in COUNTERS)
