"""Tensor parallelism: a block is cut by heads into shards, each with a key, a slot and a checksum of its own.

    4 KV heads, head_shards=2     shard 0: heads 0, 1     shard 1: heads 2, 3
    an engine of degree 1         rank 0 has both
    an engine of degree 2         rank 0 has shard 0, rank 1 has shard 1

Engines of unequal degree share when they cut blocks into equally many shards (setting ``head_shards``; by default an engine
makes as many as it has ranks). A shard is read whole and verified whole, by whoever has its heads; no rank reads what it does
not need. Within a shard bytes lie as in the engine's tensors: layer by layer, of each layer the contiguous runs.

Where all ranks hold the same (one latent head, or fewer heads than ranks), they share one shard and the first of them saves it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvshare.errors import NamespaceError
from kvshare.integrations.vllm.pages import Pages, Saving
from kvshare.keys import FAMILY_BYTES
from kvshare.loading import LoadPlan
from kvshare.transport.base import Completion, Transfer

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


@dataclass(frozen=True)
class Shards:
    """How many shards a block has; ``own``: those of this rank, in order; ``saves``: this rank saves them."""

    count: int = 1
    own: range = range(1)
    saves: bool = True

    def heads(self, shard: int, rank_heads: int) -> slice:
        """Which of the rank's heads belong to a shard of its own."""
        each = rank_heads // len(self.own)
        first = (shard - self.own.start) * each
        return slice(first, first + each)


def shards_of(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, head_shards: int) -> Shards:
    """The shards of this worker's rank. ``head_shards``: the setting, 0 for as many as there are ranks.

    Raises:
        NamespaceError: the heads cannot be cut so.
    """
    from vllm.v1.kv_cache_interface import MLAAttentionSpec

    parallel = vllm_config.parallel_config
    ranks, rank = parallel.tensor_parallel_size, parallel.rank % parallel.tensor_parallel_size
    if isinstance(kv_cache_config.kv_cache_groups[0].kv_cache_spec, MLAAttentionSpec):
        return Shards(1, range(1), rank == 0)
    return cut(vllm_config.model_config.get_total_num_kv_heads(), ranks, rank, head_shards)


def cut(heads: int, ranks: int, rank: int, head_shards: int) -> Shards:
    """As `shards_of`: ``heads`` KV heads over ``ranks``."""
    count = head_shards or min(ranks, heads)
    if heads % count:
        raise NamespaceError(
            f"setting 'head_shards' cannot be {count} for a model of {heads} KV heads: use a divisor of that in all engines"
        )
    if heads < ranks:
        if count != heads:
            raise NamespaceError(
                f"setting 'head_shards' cannot be {count} where {ranks} ranks hold {heads} KV heads: use {heads}"
            )
        shard = rank * heads // ranks
        return Shards(count, range(shard, shard + 1), rank == -(-shard * ranks // heads))
    if count % ranks:
        raise NamespaceError(
            f"setting 'head_shards' cannot be {count} with {ranks} tensor-parallel ranks: use a multiple of any engine's"
        )
    each = count // ranks
    return Shards(count, range(rank * each, (rank + 1) * each))


class ShardedPages:
    """The pages of a rank's shards, in one. ``parts``: of each shard of the rank; ``families``: of each shard of a block."""

    def __init__(self, shards: Shards, parts: Sequence[Pages], families: Sequence[bytes]) -> None:
        assert len(parts) == len(shards.own) and len(families) == shards.count
        self._shards = shards
        self._parts = list(parts)
        self._families = list(families)

    def load(self, plan: LoadPlan, block_ids: Sequence[int]) -> Transfer:
        """Carries out the parts of ``plan`` that are of this rank's shards. A block is there when all of these are."""
        plans = [plan, *(replace(other, seconds=plan.seconds, grace_seconds=plan.grace_seconds) for other in plan.others)]
        own = [part.load(plans[shard], block_ids) for shard, part in zip(self._shards.own, self._parts, strict=True)]
        return own[0] if len(own) == 1 else joined(own)

    def save(self, block_keys: list[bytes], block_ids: Sequence[int]) -> Saving:
        """``block_keys``: of shard 0; those of the others differ in their family."""
        if not self._shards.saves:
            return Savings([])
        own = [
            part.save([self._families[shard] + key[FAMILY_BYTES:] for key in block_keys], block_ids)
            for shard, part in zip(self._shards.own, self._parts, strict=True)
        ]
        return own[0] if len(own) == 1 else Savings(own)

    def close(self) -> None:
        for part in self._parts:
            part.close()


class Savings:
    """Several `Saving` as one."""

    saved = 0  # blocks all of whose shards are saved, once it is done

    def __init__(self, parts: Sequence[Saving]) -> None:
        self._parts = list(parts)

    @property
    def done(self) -> bool:
        if not all(part.done for part in self._parts):
            return False
        self.saved = min((part.saved for part in self._parts), default=0)
        return True

    def wait(self, timeout: float | None = None) -> bool:
        deadline = None if timeout is None else time.monotonic() + timeout
        return all(part.wait(None if deadline is None else max(0.0, deadline - time.monotonic())) for part in self._parts)

    def cancel(self) -> None:
        for part in self._parts:
            part.cancel()


def joined(transfers: Sequence[Transfer]) -> Transfer:
    """Reads of the same blocks as one: a block has the status of the first of its parts that is not OK."""
    whole = Transfer()
    lock, left = threading.Lock(), len(transfers)
    ended: list[Completion] = []

    def finished(completion: Completion) -> None:
        nonlocal left
        with lock:
            ended.append(completion)
            left -= 1
            last = left == 0
        if last:
            whole.complete(_combined(ended))

    def cancel() -> None:
        for transfer in transfers:
            transfer.cancel()

    whole.on_cancel = cancel
    for transfer in transfers:
        transfer.then(finished)
    return whole


def _combined(completions: Sequence[Completion]) -> Completion:
    statuses: npt.NDArray[np.uint8] = completions[0].statuses
    for completion in completions[1:]:
        statuses = np.where(statuses != 0, statuses, completion.statuses)
    errors = dict.fromkeys(completion.error for completion in completions if completion.error)
    seconds = max(completion.seconds for completion in completions)
    return Completion(statuses, sum(completion.bytes for completion in completions), seconds, "; ".join(errors))
