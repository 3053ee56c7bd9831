"""Where a block's bytes lie in vLLM's KV cache.

vLLM hands over one tensor per layer, ``[blocks, heads, tokens, content]`` (or with kernel blocks that split a block), in any
memory order. A block is the concatenation of its *pages*: for every layer, in the group's order, the contiguous runs that one
block has in that layer's tensor.

    layer 0: base address + block * stride ─┬─ page 0 (page_bytes[0])
                                            └─ page 1 ...      several when another dimension lies outside the block's
    layer 1: ...

What the concatenation means (order of dimensions, sizes, attention backend, on a CPU its instruction set) is `packing`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvshare.errors import NamespaceError
from kvshare.transport.base import Targets

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

U64 = npt.NDArray[np.uint64]
DIMENSIONS = "HNC"  # heads, tokens, content; "K" before them where a block is split into kernel blocks


@dataclass(frozen=True)
class Layout:
    """bases, strides, page_bytes: uint64 [pages]; page j of block b lies at ``bases[j] + b * strides[j]``.

    The memory belongs to vLLM, which keeps it as long as the worker lives.
    """

    bases: U64
    strides: U64
    page_bytes: U64
    packing: str
    device: str  # its kind
    device_index: int = 0

    @property
    def block_bytes(self) -> int:
        return int(self.page_bytes.sum())

    def targets(self, block_ids: Sequence[int]) -> Targets:
        """The pages of these blocks, for a load or a save. Addresses in the layout's device."""
        ids = np.asarray(block_ids, np.uint64)
        return Targets(self.bases[None, :] + ids[:, None] * self.strides[None, :], self.page_bytes)

    @classmethod
    def of(
        cls,
        kv_caches: Mapping[str, torch.Tensor],
        kv_cache_config: KVCacheConfig,
        vllm_config: VllmConfig,
        heads: slice | None = None,
    ) -> Layout:
        """``heads``: these of each layer only, a shard of the block (`kvshare.integrations.vllm.sharding`).

        Raises:
            NamespaceError: a tensor cannot be addressed block by block.
        """
        group = kv_cache_config.kv_cache_groups[0]
        _require_only_aliases(kv_caches, group.layer_names)
        pages: list[tuple[int, int, int]] = []
        packings = []
        for name in group.layer_names:
            tensor = kv_caches[name] if heads is None else kv_caches[name][:, heads]
            layer_pages, packing = pages_of(tensor, kv_cache_config.num_blocks)
            pages += layer_pages
            packings.append(f"{packing}/{_backend(vllm_config, name)}")
        if len(set(packings)) != 1:
            raise NamespaceError(f"its layers are packed in different ways ({', '.join(sorted(set(packings)))})")
        bases, strides, lengths = (np.array(column, np.uint64) for column in zip(*pages, strict=True))
        where = kv_caches[group.layer_names[0]].device
        device = where.type
        packing = f"{device}/{packings[0]}"
        if device == "cpu":
            packing += f"/{_instruction_set(vllm_config, group.kv_cache_spec)}"
        layout = cls(bases, strides, lengths, packing, device, where.index or 0)
        expected = len(group.layer_names) * group.kv_cache_spec.unpadded_page_size_bytes
        if heads is not None:
            expected = expected * (heads.stop - heads.start) // group.kv_cache_spec.num_kv_heads
        if layout.block_bytes != expected:
            raise NamespaceError(f"a block has {layout.block_bytes} bytes where vLLM says {expected}")
        return layout


def pages_of(tensor: torch.Tensor, num_blocks: int) -> tuple[list[tuple[int, int, int]], str]:
    """``(address of block 0's page, bytes between blocks, length)`` of each page, and how elements lie in them.

    Raises NamespaceError when blocks are not the tensor's first dimension, or overlap.
    """
    if tensor.shape[0] % num_blocks:
        raise NamespaceError(f"a KV tensor of shape {tuple(tensor.shape)} is not made of {num_blocks} blocks")
    split = tensor.shape[0] != num_blocks
    blocks = tensor.unflatten(0, (num_blocks, -1)) if split else tensor
    item = blocks.element_size()
    names = ("K" if split else "") + DIMENSIONS[split - blocks.dim() + 1 :]
    # Innermost first. A dimension of one element lies nowhere: its stride means nothing.
    dimensions = sorted(
        (stride, size, name)
        for stride, size, name in zip(blocks.stride()[1:], blocks.shape[1:], names, strict=True)
        if size > 1
    )
    run = 1
    outer: list[tuple[int, int]] = []
    for stride, size, _ in dimensions:
        if stride == run and not outer:
            run *= size
        else:
            outer.append((stride, size))
    if blocks.stride(0) < run or any(stride < run for stride, _ in outer):
        raise NamespaceError(f"blocks overlap in a KV tensor of strides {tuple(blocks.stride())}")
    # Outermost first, so that the concatenation is the same whether heads lie inside or outside of the blocks.
    steps = [range(0, stride * size, stride) for stride, size in reversed(outer)]
    offsets = [sum(offset) for offset in itertools.product(*steps)]
    pages = [(blocks.data_ptr() + offset * item, blocks.stride(0) * item, run * item) for offset in offsets]
    assert run * len(offsets) == math.prod(blocks.shape[1:])
    order = "".join(f"{name}{size}" for _, size, name in reversed(dimensions))
    return pages, f"{order}x{item}"


def _require_only_aliases(kv_caches: Mapping[str, torch.Tensor], layer_names: Sequence[str]) -> None:
    """Layers beside the group's may only share the group's memory: anything else would be missing from a block."""
    known = {kv_caches[name].data_ptr() for name in layer_names if name in kv_caches}
    missing = [name for name in layer_names if name not in kv_caches]
    foreign = [name for name, tensor in kv_caches.items() if name not in layer_names and tensor.data_ptr() not in known]
    if missing or foreign:
        raise NamespaceError(f"its KV cache has layers apart from its group ({', '.join([*missing, *foreign][:3])})")


def _backend(vllm_config: VllmConfig, layer_name: str) -> str:
    layer: Any = vllm_config.compilation_config.static_forward_context.get(layer_name)
    return layer.get_attn_backend().get_name() if layer is not None else "unknown"


def _instruction_set(vllm_config: VllmConfig, spec: Any) -> str:
    """The CPU backend packs K by instruction set."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    return str(
        _get_attn_isa(vllm_config.model_config.dtype, spec.block_size, spec.head_size, vllm_config.cache_config.cache_dtype)
    )
