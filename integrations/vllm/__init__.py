"""The vLLM hook: `KVShareConnector` (found by vLLM through the entry point of `plugin`) and the readiness gate `wait_warm`.

Importing this starts nothing and needs no vLLM.
"""

from __future__ import annotations

from kvshare.integrations.vllm.warm import wait_warm

__all__ = ["wait_warm"]
