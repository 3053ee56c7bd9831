"""The readiness gate: is what is hot in the cluster here, so that this host's engines start warm?"""

from __future__ import annotations

import time

from kvshare.config import Settings
from kvshare.errors import Unavailable
from kvshare.messages import AskWarm
from kvshare.session import WarmState, call, warm_state

PAUSE_SECONDS = 0.2  # between attempts to reach a node that is only starting
ANSWER_SECONDS = 2.0  # for a node's answer, beyond what it was asked to wait
ALL = b""  # families: those of all engines attached here


def wait_warm(timeout: float, settings: Settings | None = None) -> WarmState:
    """Wait until the warm plans of all engines attached to this host's node are done, at most ``timeout`` seconds.

    ``WarmState.done`` is False when the time was not enough, or no engine has attached yet. Callable from any process of the
    host: a readiness probe, a Ray actor that is about to report itself healthy.

    Raises:
        Unavailable: the host has no node within ``timeout``. ConfigError: a setting in the environment is wrong.
    """
    settings = settings or Settings.load()
    deadline = time.monotonic() + timeout
    while True:
        left = max(0.0, deadline - time.monotonic())
        try:
            return _ask(settings, left)
        except Unavailable:
            if left <= PAUSE_SECONDS:
                raise
            time.sleep(PAUSE_SECONDS)


def _ask(settings: Settings, seconds: float) -> WarmState:
    return warm_state(call(settings, lambda ask: AskWarm(ask, ALL, seconds), seconds + ANSWER_SECONDS))
