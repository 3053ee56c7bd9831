"""kvshare: a vLLM worker arrives warm and leaves without loss.

The names here are the public API; see the README for the vLLM hook and Ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvshare.config import Settings
from kvshare.errors import ConfigError, KVShareError, NamespaceError, Unavailable
from kvshare.keys import Namespace

if TYPE_CHECKING:
    from kvshare.integrations.api import Cache, connect

__version__ = "0.1.0"
__all__ = ["Cache", "ConfigError", "KVShareError", "Namespace", "NamespaceError", "Settings", "Unavailable", "connect"]


def __getattr__(name: str) -> Any:
    # Late: `import kvshare` stays cheap in every process of an engine, and lower layers never load a higher one.
    if name in ("Cache", "connect"):
        from kvshare.integrations import api

        return getattr(api, name)
    raise AttributeError(f"module 'kvshare' has no attribute {name!r}")
