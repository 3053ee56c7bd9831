"""An engine whose connector can be taken out and put back between two rounds, so that "with" and "without" are one process.

Two processes of the same engine differ in speed by more than what is measured here (10 to 30 % seen: where their memory came to
lie); one process compared with itself does not. Without its connector an engine does everything as one that has none, except
that the executor still looks for a connector's results in a step's output (a few microseconds).
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.v1.core.sched.scheduler import Scheduler

ARGUMENTS = {"scheduler_cls": "toggle.ToggledScheduler", "worker_extension_cls": "toggle.ToggledWorker"}


class ToggledScheduler(Scheduler):  # type: ignore[misc]
    """``reset_prefix_cache(reset_connector=True)``, which reaches the scheduler from outside, takes its connector out or puts
    it back. The engine must be at rest."""

    taken_out: Any = None

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        if reset_connector:
            self.connector, self.taken_out = self.taken_out, self.connector
        emptied: bool = super().reset_prefix_cache(reset_running_requests)
        return emptied


class ToggledWorker:
    """Mixed into vLLM's worker."""

    connector_taken_out: Any = None

    def toggle_connector(self) -> None:
        state: Any = kv_transfer_state
        state._KV_CONNECTOR_AGENT, self.connector_taken_out = self.connector_taken_out, state._KV_CONNECTOR_AGENT


def toggle(llm: Any) -> None:
    """Both halves. The engine's prefix cache is empty afterwards."""
    llm.collective_rpc("toggle_connector")
    assert llm.reset_prefix_cache(reset_connector=True)
