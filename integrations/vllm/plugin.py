"""Entry point ``vllm.general_plugins``: makes ``"kv_connector": "KVShareConnector"`` known in every process of vLLM."""

from __future__ import annotations

import functools

NAME = "KVShareConnector"


@functools.cache  # vLLM may call it several times in a process; registering a name twice is an error there
def register() -> None:
    """Register the connector by name; its module is imported when an engine asks for it."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    KVConnectorFactory.register_connector(NAME, "kvshare.integrations.vllm.connector", NAME)
