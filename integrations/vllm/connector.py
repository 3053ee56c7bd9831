"""`KVShareConnector`: vLLM's connector interface over the two halves. Thin: each method is a line or two.

vLLM makes one instance in the engine's scheduler process and one in each worker process. Without a half (the model is not
served, the node cannot be reached) every method answers as if there were no connector.

    worker: register_kv_caches ── attach ──> Hello ──> scheduler: set_xfer_handshake_metadata ── attach
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats

from kvshare.integrations.vllm.attach import attach_scheduler, attach_worker
from kvshare.integrations.vllm.identity import settings_from, settings_of
from kvshare.integrations.vllm.metadata import NOTHING, Hello, StepMetadata, TransferStats
from kvshare.integrations.vllm.scheduler_half import SchedulerHalf
from kvshare.integrations.vllm.worker_half import WorkerHalf

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

log = logging.getLogger("kvshare")

NOTHING_ENDED = KVConnectorTransferResults()  # the answer of nearly every step; vLLM only reads it


class KVShareConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """See the module's docstring."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        self._settings, self._weights = settings_of(vllm_config)
        _speak_through_vllm()
        # A block that fails is recomputed, never an engine's error, whatever vLLM's default; its scheduler reads this later.
        vllm_config.kv_transfer_config.kv_load_failure_policy = "recompute"
        super().__init__(vllm_config, role, kv_cache_config)
        self._worker: WorkerHalf | None = None
        self._scheduler: SchedulerHalf | None = None
        self._hello: Hello | None = None
        self._seed_checked = False

    # --- before the engine exists: wrong settings are told here --------------------------------------------------------

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        settings_of(vllm_config)
        return None

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        settings_from(extra_config)
        return False

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: what is not saved is a miss later, so that no preemption has to be undone for it."""
        return False

    # --- worker ---------------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        attached = attach_worker(self._vllm_config, self._kv_cache_config, kv_caches, self._settings, self._weights)
        if attached is not None:
            self._worker, self._hello = attached

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self._hello

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        if self._worker is not None:
            self._worker.prepare(kv_connector_metadata)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None:
            self._worker.prepare(connector_metadata)

    def has_connector_metadata(self) -> bool:
        """vLLM asks before its two calls per layer: there is nothing for a layer to do."""
        return False

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing: loads began in `bind_connector_metadata`, beside the forward instead of after it."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: requests wait for their loads before they are scheduled."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: blocks are saved whole, after the forward."""

    def wait_for_save(self) -> None:
        if self._worker is not None and self._connector_metadata is not NOTHING:
            self._worker.start_saves(self._step())

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        ended = self._worker.finished(self._step()) if self._worker is not None else None
        return KVConnectorTransferResults(finished_recving=ended) if ended else NOTHING_ENDED

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.failed_blocks() if self._worker is not None else set()

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        return self._worker.stats() if self._worker is not None else None

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        return self._worker.reads() if self._worker is not None else None

    # --- scheduler ------------------------------------------------------------------------------------------------------

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]) -> None:
        hellos = [hello for _, hello in sorted(metadata.items()) if isinstance(hello, Hello)]
        # A rank that could not attach would never have its part of a block.
        if len(hellos) == self._vllm_config.parallel_config.tensor_parallel_size:
            self._scheduler = attach_scheduler(self._vllm_config, self._settings, hellos)
            self._hello = hellos[0]

    def on_new_request(self, request: Request) -> None:
        self._check_seed()
        if self._scheduler is not None:
            self._scheduler.arrived(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        if self._scheduler is None:
            return 0, False
        tokens = self._scheduler.matched(request, num_computed_tokens)
        return tokens, bool(tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        if self._scheduler is not None:
            block_ids = blocks.get_block_ids()[0] if num_external_tokens else []
            self._scheduler.allocated(request, block_ids, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self._scheduler.step(scheduler_output) if self._scheduler is not None else StepMetadata()

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        if self._scheduler is None:
            return
        if connector_output.kv_connector_worker_meta is not None:
            self._scheduler.reads_ended(connector_output.kv_connector_worker_meta)
        if connector_output.finished_recving:
            self._scheduler.loads_ended(connector_output.finished_recving, connector_output.invalid_block_ids or set())

    def take_events(self) -> Iterable[KVCacheEvent]:
        """vLLM asks once for each step that is back, in their order: what we have to know. We have no events."""
        if self._scheduler is not None:
            self._scheduler.step_returned()
        return ()

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        if self._scheduler is not None:
            self._scheduler.finished(request)
        return False, None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, [])

    def reset_cache(self) -> bool | None:
        if self._scheduler is not None:
            self._scheduler.reset()
        return True

    # --- both -----------------------------------------------------------------------------------------------------------

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return TransferStats.of(data)

    def shutdown(self) -> None:
        for half in (self._worker, self._scheduler):
            if half is not None:
                half.close()
        self._worker = self._scheduler = None

    def _step(self) -> StepMetadata:
        step = self._get_connector_metadata()
        assert isinstance(step, StepMetadata)
        return step

    def _check_seed(self) -> None:
        """vLLM chooses its hashes' seed after we attached: it must be the one in our namespace."""
        if self._seed_checked or self._scheduler is None:
            return
        self._seed_checked = True
        from vllm.v1.core.kv_cache_utils import get_none_hash_seed

        assert self._hello is not None
        if get_none_hash_seed() != self._hello.namespaces[0].hash_seed:
            log.error("kvshare: this engine runs unshared: its block hashes start from another seed than PYTHONHASHSEED says")
            self._scheduler.close()
            self._scheduler = None


def _speak_through_vllm() -> None:
    """Our log lines through vLLM's handlers: an engine's user looks there. Once per process, by the connector's maker."""
    ours, theirs = logging.getLogger("kvshare"), logging.getLogger("vllm")
    if not ours.handlers and theirs.handlers:
        for handler in theirs.handlers:
            ours.addHandler(handler)
        ours.setLevel(os.environ.get("KVSHARE_LOG_LEVEL", "INFO").upper())
        ours.propagate = False
