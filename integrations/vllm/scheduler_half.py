"""The connector's half in the engine's scheduler process: decides what is loaded and what is saved.

Write path. A block is complete once the step that computes its last token has run, and named once all its tokens are known
(``request.block_hashes``). The half lists it in that very step's metadata; the worker saves it after the forward. No block is
held for a save: `StepMetadata.overwritten` names what a step may write to, and the worker gives up pending saves of it.

Read path. `arrived` asks the session about a new request's chain; `matched` answers from what is known, or "ask again" while
the question travels (bounded by ``lookup_seconds``); `allocated` turns the answer into a load; the worker reports its end.

    WAITING ─ matched: None ─> ask again     matched: n > 0 ─ allocated ─> loading ─ loads_ended ─> scheduled, computes the rest
       └───── matched: 0 ────> computes                                       └─ blocks failed ─> recomputed, not asked again

Two requests that want one block: the second waits until the first one's load has ended, then finds it in vLLM's own cache.

Threads: the scheduler's only.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from kvshare import keys
from kvshare.cost import Cost
from kvshare.integrations.vllm.adapters import Adapters
from kvshare.integrations.vllm.identity import covers_extra_keys
from kvshare.integrations.vllm.live import LiveCache
from kvshare.integrations.vllm.metadata import NOTHING, Load, Reads, Save, StepMetadata
from kvshare.loading import LoadPlan, Offer
from kvshare.tenants import NAME_REMEDY, tag_of

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

log = logging.getLogger("kvshare")

GROUP = 0  # engines with one KV cache group are served


class Chain(Protocol):
    """A `kvshare.question.Question`."""

    def available(self, start: int) -> int | None: ...

    def offer(self, start: int, count: int) -> Offer: ...

    def plan(self, start: int, count: int) -> LoadPlan: ...

    def close(self, hits: int) -> None: ...


class Lookup(Protocol):
    """What this half needs of a `kvshare.session.Session`, or of several (`kvshare.integrations.vllm.lookup`)."""

    def ask(self, prefix: bytes, hashes: Sequence[bytes], patience_seconds: float, fetch_seconds: float) -> Chain: ...

    def local(self, prefix: bytes, hashes: Sequence[bytes]) -> Any: ...

    def still(self, local: Any) -> npt.NDArray[np.bool_]: ...

    def close(self) -> None: ...


@dataclass
class Tracked:
    """A request. ``prefix`` is None while it is not known (an adapter is being read) or when the request is not shared."""

    request: Request
    preemptions: int
    shared: bool
    prefix: bytes | None = None
    question: Chain | None = None
    hits: int = 0  # leading blocks that the engine's own cache had when `matched` was asked last
    offered: int = 0  # blocks behind those that `matched` promised last
    next_save: int | None = None  # the first block not yet listed for saving
    due: int = 0  # it is complete once so many tokens are computed, if not later
    loaded: int = 0  # blocks in front of this one came from peers, or were in our node
    failed: bool = False  # a load of its failed: it computes from now on


class SchedulerHalf:
    """See the module's docstring."""

    def __init__(
        self,
        session: Lookup,
        namespace: keys.Namespace,
        block_bytes: int,
        load_bytes_max: int,
        loads: bool = True,
        saves: bool = True,
        live: LiveCache | None = None,
        tenant: str = "",
    ) -> None:
        self._session = session
        self._live = live
        self._family = namespace.family()
        self._tenant = keys.tenant_tag(tenant)  # of requests that name none
        self._tenant_said = False
        self._block_size = namespace.block_size
        self._block_bytes = block_bytes
        self._load_bytes_max = load_bytes_max
        self._cost = Cost(block_bytes, namespace.block_size)
        self._may_load, self._may_save = loads, saves
        self._extra_keys_agree = covers_extra_keys(namespace.hash_algorithm)
        self._adapters = Adapters()
        self._requests: dict[str, Tracked] = {}
        self._loads: dict[str, Load] = {}
        self._loading: dict[bytes, str] = {}  # key -> request that loads it
        self._planned: list[Load] = []  # since the last step
        self._postponed: list[Save] = []  # to the next step
        self._epoch = 0
        self._secret = ""  # of our own namespace, once the weights may have changed

    # --- read path ----------------------------------------------------------------------------------------------------

    def arrived(self, request: Request) -> None:
        """A new request: start its question, so that the answer is here when the scheduler asks."""
        self._track(request)

    def matched(self, request: Request, computed_tokens: int) -> int | None:
        """Tokens behind the ``computed_tokens`` first that can be loaded now; None: ask again at the next step."""
        tracked = self._track(request)
        tracked.hits, tracked.offered = computed_tokens // self._block_size, 0
        if tracked.shared and tracked.prefix is None:
            return None
        if tracked.question is None or tracked.failed or request.skip_reading_prefix_cache:
            return 0
        start = tracked.hits
        # The last token is always computed: its logits are wanted.
        limit = (request.num_tokens - 1) // self._block_size
        if start >= limit:
            return 0
        count = tracked.question.available(start)
        if count is None:
            return None
        count = self._affordable(min(count, limit - start))
        if count <= 0:
            return 0
        if self._loading and not self._loading.keys().isdisjoint(self._keys(tracked, start, count)):
            return None
        tracked.offered = self._worth(tracked.question, start, count)
        return tracked.offered * self._block_size

    def allocated(self, request: Request, block_ids: list[int], external_tokens: int) -> None:
        """The scheduler admitted the request; ``external_tokens`` of it are to be loaded, at most what `matched` said."""
        tracked = self._track(request)
        question, start, count = tracked.question, tracked.hits, external_tokens // self._block_size
        if question is not None:
            question.close(start + count)
        if not count:
            return
        assert question is not None and tracked.prefix is not None and count <= tracked.offered
        plan = self._cost.limited(question.plan(start, count), question.offer(start, count), self._plans(), time.monotonic())
        load = Load(request.request_id, plan, block_ids[start : start + count], self._epoch)
        # What came from a peer is saved to our own node; what our node has is not saved again.
        tracked.next_save, tracked.due, tracked.loaded = start, 0, start + count
        self._loads[request.request_id] = load
        self._loading.update(dict.fromkeys(load.plan.keys, request.request_id))
        self._planned.append(load)

    def loads_ended(self, request_ids: Iterable[str], failed_blocks: set[int]) -> None:
        """The worker says that these requests' loads have ended, and which blocks of the engine's cache are undefined."""
        for request_id in request_ids:
            load = self._loads.pop(request_id, None)
            if load is None:
                continue
            for key in load.plan.keys:
                if self._loading.get(key) == request_id:
                    del self._loading[key]
            tracked = self._requests.get(request_id)
            if tracked is not None and not failed_blocks.isdisjoint(load.block_ids):
                tracked.failed = True

    def reads_ended(self, reads: Reads) -> None:
        """The worker says what reads have moved."""
        self._cost.measured(reads.measured, time.monotonic())

    # --- write path ---------------------------------------------------------------------------------------------------

    def step(self, output: SchedulerOutput) -> StepMetadata:
        """What the worker has to do in this step. Nearly always nothing, and every microsecond is one of a decoded token."""
        planned, saves = self._planned, list[Save]()
        overwritten = self._handed_out(output)
        if planned:
            self._planned = []
            overwritten += [block_id for load in planned for block_id in load.block_ids]
        if self._live is not None:
            self._live.begin(overwritten)
        if self._may_save:
            if self._postponed:
                saves += self._due(frozenset(overwritten))
            for request_id, tokens in output.num_scheduled_tokens.items():
                tracked = self._requests.get(request_id)
                if tracked is not None and tracked.request.num_computed_tokens + tokens >= tracked.due:
                    saves += self._completed(tracked, tokens, output.kv_connector_block_state)
        if self._live is not None:
            self._live.sent()
        tokens = output.total_num_scheduled_tokens
        self._cost.sent(tokens, time.monotonic())
        if tokens and not (planned or saves or overwritten or self._epoch):
            return NOTHING
        return StepMetadata(planned, saves, overwritten, tokens > 0, self._epoch)

    def step_returned(self) -> None:
        """The oldest step that was not back is back."""
        self._cost.returned(time.monotonic())
        if self._live is not None:
            self._live.returned()

    def _due(self, overwritten: frozenset[int]) -> list[Save]:
        """Saves postponed from the step before, without what this step writes to: their requests may have let go of it."""
        postponed, self._postponed = self._postponed, []
        kept = []
        for save in postponed:
            still = [i for i, block_id in enumerate(save.block_ids) if block_id not in overwritten]
            if still:
                kept.append(Save([save.keys[i] for i in still], [save.block_ids[i] for i in still]))
        return kept

    def _handed_out(self, output: SchedulerOutput) -> list[int]:
        """Blocks that requests got in this step: they may hold another request's blocks that are still being saved."""
        block_ids: list[int] = []
        for new in output.scheduled_new_reqs:
            block_ids += new.block_ids[GROUP][new.num_computed_tokens // self._block_size :]
        cached = output.scheduled_cached_reqs
        if not any(cached.new_block_ids):
            return block_ids
        for request_id, new_ids, computed in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
            if new_ids is None:
                continue
            # Of a resumed request these are all of its blocks.
            resumed = request_id in cached.resumed_req_ids
            block_ids += new_ids[GROUP][computed // self._block_size if resumed else 0 :]
        return block_ids

    def _completed(self, tracked: Tracked, tokens: int, blocks: Any) -> list[Save]:
        """Blocks of a request that are complete once this step has computed ``tokens`` more, and not saved yet."""
        request, size = tracked.request, self._block_size
        if tracked.next_save is None:
            tracked.next_save = request.num_computed_tokens // size
        start = tracked.next_save
        tracked.due = (start + 1) * size
        # Tokens that speculation only guessed have no hash: what is hashed and computed is final.
        end = min((request.num_computed_tokens + tokens) // size, len(request.block_hashes))
        if not tracked.shared or tracked.prefix is None or end <= start:
            return []
        tracked.next_save, tracked.due = end, (end + 1) * size
        hashes = request.block_hashes[start:end]
        held = self._session.still(self._session.local(tracked.prefix, hashes))
        absent = np.flatnonzero(~held).tolist()
        if self._live is None and not absent:
            return []
        block_ids = blocks.get_block_ids(request.request_id)[GROUP][start:end]
        if self._live is not None:
            self._live.completing([tracked.prefix + block_hash for block_hash in hashes], block_ids)
        # Copying what a peer has already would delay this request's first token: it is done when that is out.
        borrowed = [i for i in absent if start + i < tracked.loaded]
        made = [i for i in absent if start + i >= tracked.loaded]
        saves = [
            Save([tracked.prefix + hashes[i] for i in chosen], [block_ids[i] for i in chosen]) for chosen in (borrowed, made)
        ]
        self._postponed += [save for save in saves[:1] if save.keys]
        return [save for save in saves[1:] if save.keys]

    # --- life ---------------------------------------------------------------------------------------------------------

    def finished(self, request: Request) -> None:
        """The request is done or aborted. A load of its may still run: the worker will name it."""
        tracked = self._requests.pop(request.request_id, None)
        if tracked is not None and tracked.question is not None:
            tracked.question.close(0)

    def reset(self) -> None:
        """The engine's weights may have changed: from now on its blocks are nobody else's, nor theirs ours."""
        self._secret = os.urandom(16).hex()
        self._epoch += 1
        self._postponed.clear()
        if self._live is not None:
            self._live.reset()
        for tracked in self._requests.values():
            if tracked.request.num_computed_tokens == 0:
                self._begin(tracked)
            else:
                # Its first blocks are made by the old weights. If it is preempted it starts afresh.
                tracked.shared = False
        log.warning(
            "kvshare: this engine's cache was reset, its weights may have changed: it shares blocks only with itself from "
            "now on; restart it to share again"
        )

    def close(self) -> None:
        if self._live is not None:
            self._live.close()
        self._session.close()

    def check(self) -> list[str]:
        """Problems found; empty when all is well."""
        return [f"{key.hex()} waits for {name}, which loads nothing" for key, name in self._loading.items()
                if name not in self._loads]  # fmt: skip

    def _track(self, request: Request) -> Tracked:
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            tracked = self._requests[request.request_id] = Tracked(request, request.num_preemptions, shared=True)
            self._begin(tracked)
        elif tracked.preemptions != request.num_preemptions:
            tracked.preemptions = request.num_preemptions
            self._begin(tracked)
        elif tracked.shared and tracked.prefix is None:
            self._begin(tracked)
        return tracked

    def _begin(self, tracked: Tracked) -> None:
        """(Re)start a request that holds no blocks: its prefix, its question."""
        request = tracked.request
        tracked.question, tracked.hits, tracked.offered, tracked.next_save, tracked.loaded = None, 0, 0, None, 0
        tracked.due = 0  # until its first step
        tracked.prefix = self._prefix(request)
        tracked.shared = tracked.prefix != b""
        if not tracked.prefix or not self._may_load or tracked.failed:
            return
        limit = (request.num_tokens - 1) // self._block_size
        if limit > 0:
            hashes = request.block_hashes[:limit]
            patience, fetch = self._cost.patience(limit), self._cost.fetch_seconds(limit)
            tracked.question = self._session.ask(tracked.prefix, hashes, patience, fetch)

    def _prefix(self, request: Request) -> bytes | None:
        """The request's part of its keys; None while it is being found out, empty when the request is not shared."""
        tenant = self._tenant_of(request)
        if tenant is None:
            return b""
        extra = request.lora_request is not None or bool(request.mm_features) or request.prompt_embeds is not None
        if extra and not self._extra_keys_agree:
            return b""
        adapter = b""
        if request.lora_request is not None:
            identity = self._adapters.identity(request.lora_request)
            if not identity:
                return identity
            adapter = identity
        salt = f"{self._secret}/{request.cache_salt or ''}" if self._secret else (request.cache_salt or "")
        return keys.prefix(self._family, keys.variant(adapter, salt), GROUP, tenant)

    def _tenant_of(self, request: Request) -> bytes | None:
        """The tag of whom the request's blocks belong to; None when it names nobody that can be."""
        params = request.kv_transfer_params
        if not params or params.get("tenant") is None:
            return self._tenant
        tag = tag_of(params["tenant"])
        if tag is None and not self._tenant_said:
            self._tenant_said = True
            log.warning(
                "kvshare: a request's kv_transfer_params name the tenant %.80r, so it and others like it share no blocks: %s",
                params["tenant"],
                NAME_REMEDY,
            )
        return tag

    def _affordable(self, count: int) -> int:
        """How many of ``count`` blocks may be loaded beside what is being loaded. A lone load is always affordable: its size
        is bounded by the KV cache."""
        if not self._loads:
            return count
        under_way = sum(len(load.block_ids) for load in self._loads.values()) * self._block_bytes
        return min(count, max(0, self._load_bytes_max - under_way) // self._block_bytes)

    def _worth(self, question: Chain, start: int, count: int) -> int:
        """How many of ``count`` blocks arrive sooner than they would be computed."""
        return self._cost.worth(question.offer(start, count), self._plans(), time.monotonic())

    def _plans(self) -> list[LoadPlan]:
        return [load.plan for load in self._loads.values()]

    def _keys(self, tracked: Tracked, start: int, count: int) -> list[bytes]:
        assert tracked.prefix is not None
        return [tracked.prefix + block_hash for block_hash in tracked.request.block_hashes[start : start + count]]
