"""Entry point ``vllm.general_plugins``: makes ``"kv_connector": "KVShareConnector"`` known in every process of vLLM."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig

NAME = "KVShareConnector"


@functools.cache  # vLLM may call it several times in a process; registering a name twice is an error there
def register() -> None:
    """Register the connector by name; its module is imported when an engine asks for it."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    KVConnectorFactory.register_connector(NAME, "kvshare.integrations.vllm.connector", NAME)
    # vLLM hands a connector its settings only once the model has been loaded, minutes into a start. But it asks this, in the
    # process that the user started, while it puts its configuration together: wrong settings end the start there.
    ask = KVConnectorFactory.supports_hma_config

    def supports_hma_config(kv_transfer_config: KVTransferConfig) -> bool:
        if kv_transfer_config.kv_connector == NAME:
            from kvshare.integrations.vllm.identity import settings_from

            settings_from(kv_transfer_config.kv_connector_extra_config)
        return bool(ask(kv_transfer_config))

    KVConnectorFactory.supports_hma_config = staticmethod(supports_hma_config)
