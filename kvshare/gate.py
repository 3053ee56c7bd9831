"""Which blocks may be held here, and who may be given them: the tenants' regions, and purges that are hardly over.

    a key ── its tenant may be in this node's region? ── no ──> barred: not reserved, not pulled, not told, not found
          ── a purge of it ended a moment ago? ── yes ──> barred: what was on its way does not come back

Region and tenants are settings, so a node's answers change only with purges. Closed when unlabelled: a node, or a reader, that
says no region has none of a tenant that is bound to regions.

Pure. Threads: purges come and go on the node's loop; questions from any thread.
"""

from __future__ import annotations

import logging
from typing import Protocol

from kvshare.keys import tenant_of
from kvshare.purge import Matches

log = logging.getLogger("kvshare")


class TenantRegions(Protocol):
    """What this needs of `kvshare.tenants.Tenants`."""

    @property
    def bound(self) -> bool:
        """Is any tenant bound to regions?"""

    def may_be_in(self, tag: bytes, region: str) -> bool:
        """May blocks of the tenant of this tag be in that region?"""


class Gate:
    """See the module's docstring. ``region``: where this node stands; "" says nothing."""

    def __init__(self, tenants: TenantRegions, region: str) -> None:
        self._tenants = tenants
        self.region = region
        self.bound = tenants.bound
        self._said = False
        self._purges: tuple[Matches, ...] = ()  # replaced, never changed: read without a lock

    @property
    def active(self) -> bool:
        """May `bars` be true of any key?"""
        return self.bound or bool(self._purges)

    def bars(self, key: bytes) -> bool:
        """May a block of this key not be held here now?"""
        if self.bound and not self._tenants.may_be_in(tenant_of(key), self.region):
            self._say()
            return True
        return bool(self._purges) and any(matches(key) for matches in self._purges)

    def may_go_to(self, key: bytes, region: str) -> bool:
        """May a block of this key be given to who stands in that region?"""
        return not self.bound or self._tenants.may_be_in(tenant_of(key), region)

    def is_bound(self, key: bytes) -> bool:
        """Is this key's tenant bound to any regions? Then nobody may read its block without saying where he stands."""
        return self.bound and not self._tenants.may_be_in(tenant_of(key), "")

    def close(self, matches: Matches) -> None:
        """Bar what a purge is about, until `open`."""
        self._purges = (*self._purges, matches)

    def open(self, matches: Matches) -> None:
        """That purge is over and done with."""
        self._purges = tuple(each for each in self._purges if each is not matches)

    def _say(self) -> None:
        if not self._said:
            self._said = True
            log.warning(
                "kvshare: blocks of tenants that may not be in %s are neither kept nor found here, engines compute them "
                "(settings 'region' and 'tenants_file')",
                f"region {self.region!r}" if self.region else "a place that names no region",
            )
