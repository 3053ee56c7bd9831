"""A request router for Ray Serve that sends a request where its first token comes soonest, by what kvshare's directory knows.

    request ──> tokens, hashed ──> who holds them? ──> `kvshare.routing.Router` ──> replicas, the best first ──> Ray sends

As Ray Serve's interface for routers (2.60) has it::

    RequestRouterConfig(
        request_router_class="kvshare.integrations.ray.serve.KVShareRouter",
        request_router_kwargs={"tokenizer": "Qwen/Qwen3-8B"},
    )

Where the directory is away or silent, the namespace is unknown, or a request has no prompt that could be read, power of two
choices decides, as Ray does it. Tokens are read and hashed in the process of the router, and stay there. LoRA adapters are
Ray's model ids. Each data-parallel rank of Ray Serve LLM is a replica of its own, and so it is here.

What a deployment may tell of itself: ``{"kvshare": {"engine": NAME, "prefill_tokens_per_second": RATE}}`` from Ray's
``record_routing_stats`` or ``record_replica_metadata``. Both may be left out: the engine's cache then counts as its host's, the
rate as `Costs.prefill_rate`.

Threads: choices are made on Ray's event loop, prompts read in its thread pool; ends are told from threads of Ray's, so a lock
guards the router.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from ray.serve.request_router import LocalityMixin, MultiplexMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

from kvshare import actors
from kvshare.errors import ConfigError
from kvshare.integrations.ray.prompts import Prompt, Prompts
from kvshare.integrations.ray.watch import Watch
from kvshare.keys import Namespace
from kvshare.overlap import Held
from kvshare.routing import Choice, Costs, Replica, Router

PROMPTS_MAX = 4096  # that are remembered for Ray's further attempts
LAST_RESORT = 2  # replicas at random, after the best
SECONDS = 0.005  # for the directory's answer
RATES = tuple(field.name for field in fields(Costs) if field.name.endswith("_rate"))


class KVShareRouter(LocalityMixin, MultiplexMixin, RequestRouter):  # type: ignore[misc]
    """See the module's docstring."""

    def initialize_state(
        self,
        cluster: str = "default",
        label: str = "",
        tokenizer: str = "",
        adapters: Mapping[str, str] | None = None,
        tenant: str = "",
        lookup_seconds: float = SECONDS,
        **rates: float,
    ) -> None:
        """Called by Ray with ``request_router_kwargs``.

        cluster: kvshare's. label: the served model's name, where engines of several models share the cluster. tokenizer: name
        or folder of the model's, needed unless prompts come as token ids. adapters: model id -> path of the LoRA adapter, as
        the engines have it. tenant: of requests that name none. lookup_seconds: that the directory's answer may take. rates: of
        `kvshare.routing.Costs`, as long as none is measured.

        Raises:
            ConfigError: an unknown name.
        """
        for name in rates.keys() - set(RATES):
            raise ConfigError(f"a router cannot have {name!r}: besides its own arguments it takes {', '.join(RATES)}.")
        self._seconds = lookup_seconds
        self._prompts = Prompts(tokenizer, adapters or {}, tenant)
        self._read: OrderedDict[str, tuple[Prompt, list[Choice]]] = OrderedDict()  # by request: what it is, what was chosen
        self._router = Router(Costs(1, 1, **rates))
        self._space: Namespace | None = None
        self._lock = threading.Lock()
        self._watch = Watch(cluster, label)
        weakref.finalize(self, self._watch.close)

    # --- Ray asks -----------------------------------------------------------------------------------------------------

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The best first, each a rank of its own; behind them two at random, so that nobody waits for a full one. By load: two
        in one rank, of which Ray takes the one with the shorter queue."""
        replicas = {_name(replica.replica_id): replica for replica in self._allowed(candidate_replicas, pending_request)}
        if pending_request is None or not replicas:
            return [random.sample(list(replicas.values()), min(LAST_RESORT, len(replicas)))]
        request = pending_request.metadata.internal_request_id
        prompt = await self._prompt(pending_request)
        overlap = None if prompt.keys is None else await self._overlap(prompt)
        now = time.monotonic()
        with self._lock:
            ranked = self._router.rank(prompt.tokens, overlap, now, replicas.keys())
            if ranked:
                self._router.routed(request, ranked[0], prompt.tokens, now)
        self._remember(request, prompt, ranked)
        best = [replicas[choice.replica] for choice in ranked]
        if overlap is None:
            return [best]
        rest = [replica for replica in replicas.values() if replica not in best]
        return [*([replica] for replica in best), random.sample(rest, min(LAST_RESORT, len(rest)))]

    def _allowed(self, candidates: list[RunningReplica], pending: PendingRequest | None) -> Iterable[RunningReplica]:
        """By Ray's own rules: who has the adapter loaded, who is on this node where that is preferred."""
        by_model = pending is not None and pending.metadata.multiplexed_model_id
        allowed = self.apply_multiplex_routing(pending) if by_model else self.apply_locality_routing(pending)
        return [replica for replica in candidates if replica.replica_id in allowed]

    async def _prompt(self, pending: PendingRequest) -> Prompt:
        known = self._read.get(pending.metadata.internal_request_id)
        if known is not None and known[0].keys is not None:
            return known[0]
        space = self._watch.space()
        if space is not None and space != self._space:
            self._space = space
            shards = int(space.tensor_parallel.rpartition("/")[2])
            block_bytes = space.page_bytes * space.layers * shards
            with self._lock:
                self._router.costs = replace(self._router.costs, block_tokens=space.block_size, block_bytes=block_bytes)
        model = pending.metadata.multiplexed_model_id
        return await asyncio.to_thread(self._prompts.read, pending.args, pending.kwargs, model, space)

    async def _overlap(self, prompt: Prompt) -> dict[str, Held] | None:
        if not prompt.keys:
            return {}  # too short for a block: any will do
        return await asyncio.wrap_future(self._watch.depths(prompt.keys, self._seconds))

    def _remember(self, request: str, prompt: Prompt, ranked: list[Choice]) -> None:
        self._read[request] = prompt, ranked
        self._read.move_to_end(request)
        if len(self._read) > PROMPTS_MAX:
            self._read.popitem(last=False)

    # --- Ray tells ----------------------------------------------------------------------------------------------------

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        with self._lock:
            self._router.update(map(_described, replicas))
            for replica in replicas:
                rate = _told_by(replica).get("prefill_tokens_per_second")
                if isinstance(rate, float | int) and rate > 0:
                    self._router.computed(_name(replica.replica_id), int(rate), 1.0)

    def on_new_queue_len_info(self, replica_id: ReplicaID, num_ongoing_requests: int) -> None:
        super().on_new_queue_len_info(replica_id, num_ongoing_requests)
        with self._lock:
            self._router.told(_name(replica_id), num_ongoing_requests)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Ray may have taken another than our first."""
        request = pending_request.metadata.internal_request_id
        prompt, ranked = self._read.pop(request, (None, []))
        taken = next((choice for choice in ranked if choice.replica == _name(replica_id)), None)
        if prompt is not None and taken is not None and taken is not ranked[0]:
            with self._lock:
                self._router.routed(request, taken, prompt.tokens, time.monotonic())

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        with self._lock:
            self._router.finished(internal_request_id, time.monotonic())


def _name(replica: ReplicaID) -> str:
    return str(replica.unique_id)


def _described(replica: RunningReplica) -> Replica:
    node = actors.node_name(replica.node_id) if replica.node_id else ""
    engine = _told_by(replica).get("engine")
    return Replica(_name(replica.replica_id), node, (f"{node}/{engine}" if isinstance(engine, str) and engine else "",))


def _told_by(replica: RunningReplica) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for place in (replica.replica_metadata, replica.routing_stats):
        ours = place.get("kvshare")
        told.update(ours if isinstance(ours, dict) else {})
    return told
