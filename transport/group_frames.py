"""Frames: what travels over a group's wire, one for each portion of blocks.

    head (64 bytes) │ rows (24 bytes each: generation, checksum, status) │ MAC (32) │ padding │ block │ block │ ...

The MAC covers head and rows, is keyed with the cluster's secret and the group's id, and the head counts transfers and portions:
who has no secret cannot tell us what a block must be, nor repeat what was told before. Blocks are verified by their checksums.

Threads: any; nothing here is shared.
"""

from __future__ import annotations

import hashlib
import hmac

import msgspec
import numpy as np
import numpy.typing as npt

from kvshare import native
from kvshare.errors import AuthenticationError, ProtocolError
from kvshare.places import GroupPlan
from kvshare.wire import MAC_BYTES

U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.void]

MAGIC = b"KVSGROUP"

HEAD = np.dtype(
    {
        "names": ["magic", "transfer", "portion", "blocks", "block_bytes", "portion_blocks", "total_blocks"],
        "formats": ["S8", "<u8", "<u8", "<u8", "<u8", "<u8", "<u8"],
        "itemsize": 64,
    }
)
ROW = np.dtype([("generation", "<u8"), ("checksum", "<u8"), ("status", "<u8")])


class Shape(msgspec.Struct, frozen=True):
    """What a transfer moves: ``total_blocks`` of ``block_bytes``, ``portion_blocks`` of them at a time. Told in every head."""

    total_blocks: int
    block_bytes: int
    portion_blocks: int

    @property
    def portions(self) -> int:
        return -(-self.total_blocks // self.portion_blocks)

    @property
    def data_offset(self) -> int:
        """Where blocks begin in a frame; a multiple of 64."""
        return -(-(HEAD.itemsize + self.portion_blocks * ROW.itemsize + MAC_BYTES) // 64) * 64

    @property
    def frame_bytes(self) -> int:
        return self.data_offset + self.portion_blocks * self.block_bytes

    def bounds(self, portion: int) -> tuple[int, int]:
        """First block of a portion, and the one behind its last."""
        return portion * self.portion_blocks, min((portion + 1) * self.portion_blocks, self.total_blocks)


OPENING = Shape(0, 0, 1)  # the first frame of every transfer has no blocks: its head says what follows


class Frames:
    """Seals and opens frames of one group."""

    def __init__(self, plan: GroupPlan, secret: str) -> None:
        if not secret:
            raise AuthenticationError("no secret is set: a group needs one (setting 'secret')")
        self._key = hmac.digest(secret.encode(), b"kvshare frames of group" + plan.group, hashlib.sha256)

    def seal(self, memory: U8, transfer: int, portion: int, shape: Shape, rows: Rows) -> None:
        """Write head, rows and MAC in front of the blocks, which are in ``memory`` (uint8 [frame_bytes]) already."""
        head = np.zeros(1, HEAD)
        head["magic"], head["transfer"], head["portion"], head["blocks"] = MAGIC, transfer, portion, len(rows)
        head["block_bytes"], head["portion_blocks"] = shape.block_bytes, shape.portion_blocks
        head["total_blocks"] = shape.total_blocks
        told = head.tobytes() + rows.tobytes()
        sealed = told + hmac.digest(self._key, told, hashlib.sha256)
        memory[: len(sealed)] = np.frombuffer(sealed, np.uint8)

    def opened(self, memory: U8, transfer: int, portion: int, blocks: int) -> tuple[Shape, Rows]:
        """The shape that a frame tells and its rows, a copy.

        Raises:
            ProtocolError: the frame is not the one that is expected here, or not of the donor.
        """
        told = memory[: HEAD.itemsize + blocks * ROW.itemsize].tobytes()
        mac = memory[len(told) : len(told) + MAC_BYTES].tobytes()
        if not hmac.compare_digest(mac, hmac.digest(self._key, told, hashlib.sha256)):
            raise ProtocolError("a portion is not what the donor sent")
        head = np.frombuffer(told, HEAD, count=1)
        if (head["magic"][0], head["transfer"][0], head["portion"][0], head["blocks"][0]) != (MAGIC, transfer, portion, blocks):
            raise ProtocolError("the donor sent another portion than the next")
        shape = Shape(int(head["total_blocks"][0]), int(head["block_bytes"][0]), int(head["portion_blocks"][0]))
        return shape, np.frombuffer(told, ROW, offset=HEAD.itemsize)


def row_addresses(memory: U8, shape: Shape, count: int) -> U64:
    """Addresses of the first ``count`` blocks of a frame, uint64 [count]."""
    first = np.uint64(native.address_of(memory) + shape.data_offset)
    return first + np.arange(count, dtype=np.uint64) * np.uint64(shape.block_bytes)
