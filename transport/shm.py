"""Reads of a region of the same host, by mapping its files.

A mapping is made at the first read of a region, kept, and made anew when another file has taken the path (its owner
restarted from nothing). It stays valid when the owner dies or unlinks it; blocks of files that are gone are nevertheless
misses, since nobody will tell us of them again.

Threads: as `kvshare.transport.mapped`.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from kvshare.slots import Region
from kvshare.transport.mapped import MappedTransport

if TYPE_CHECKING:
    from kvshare.places import RegionDescription

log = logging.getLogger("kvshare")


class _Mapped(NamedTuple):
    region: Region
    file: tuple[int, int]  # device and inode of the table: a replaced file has others


class ShmTransport(MappedTransport):
    """Reads regions whose description has our ``host_id``. Serves by doing nothing: the owner's files are the service."""

    name: ClassVar[str] = "shm"

    def __init__(self, host_id: str, threads: int = 2) -> None:
        super().__init__(threads)
        self._host_id = host_id
        self._mapped: dict[tuple[str, str], _Mapped] = {}  # by node and table's path
        self._mapping = threading.Lock()
        self._own: dict[str, Region] = {}  # by table's path: this process has them mapped already

    def register(self, region: Region) -> None:
        if region.table_path:
            with self._mapping:
                self._own[region.table_path] = region

    def deregister(self, region: Region) -> None:
        with self._mapping:
            self._own.pop(region.table_path, None)

    def reaches(self, description: RegionDescription) -> bool:
        return description.host_id == self._host_id and bool(description.data_path)

    def region_of(self, description: RegionDescription) -> Region:
        """The mapping of a region. Raises OSError or RegionError: its files are gone or damaged."""
        key = (description.node, description.table_path)
        with self._mapping:
            own = self._own.get(description.table_path)
            if own is not None:
                return own
            status = os.stat(description.table_path)
            file = (status.st_dev, status.st_ino)
            mapped = self._mapped.get(key)
            if mapped is None or mapped.file != file:
                mapped = _Mapped(Region.open(description.data_path, description.table_path), file)
                self._mapped[key] = mapped
            return mapped.region

    def forget(self, node: str) -> None:
        """Drop the mappings of its regions; running reads keep theirs to their end."""
        with self._mapping:
            for key in [key for key in self._mapped if key[0] == node]:
                self._mapped.pop(key).region.close()

    def close(self) -> None:
        super().close()
        with self._mapping:
            for mapped in self._mapped.values():
                mapped.region.close()
            self._mapped.clear()
            self._own.clear()
