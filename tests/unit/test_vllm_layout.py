"""Addresses of blocks in vLLM's KV tensors in every memory order."""

from __future__ import annotations

import ctypes
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of vLLM's and torch's own making
    pytest.importorskip("vllm.distributed.kv_transfer.kv_connector.v1.base")

import torch

from kvshare.errors import NamespaceError
from kvshare.integrations.vllm.layout import Layout, pages_of
from kvshare.transport.base import Targets

LAYERS, BLOCKS, HEADS, TOKENS, CONTENT = 3, 5, 2, 4, 6
# Memory orders of vLLM (RFC 42082): where L, B, H, N, C lie, outermost first.
ORDERS = ["LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"]


def caches(order: str) -> dict[str, torch.Tensor]:
    """A KV cache of one allocation in this memory order, as views [B, H, N, C] per layer, every element different."""
    sizes = {"L": LAYERS, "B": BLOCKS, "H": HEADS, "N": TOKENS, "C": CONTENT}
    memory = torch.arange(LAYERS * BLOCKS * HEADS * TOKENS * CONTENT, dtype=torch.int16).reshape([sizes[d] for d in order])
    logical = memory.permute([order.index(d) for d in "LBHNC"])
    return {f"layer.{i}": logical[i] for i in range(LAYERS)}


def layout_of(kv_caches: dict[str, torch.Tensor], page_bytes: int = HEADS * TOKENS * CONTENT * 2) -> Layout:
    spec = SimpleNamespace(unpadded_page_size_bytes=page_bytes, block_size=TOKENS, head_size=64)
    group = SimpleNamespace(layer_names=[f"layer.{i}" for i in range(LAYERS)], kv_cache_spec=spec)
    backend = SimpleNamespace(get_attn_backend=lambda: SimpleNamespace(get_name=lambda: "TEST"))
    vllm_config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=dict.fromkeys(kv_caches, backend)),
        model_config=SimpleNamespace(dtype=torch.bfloat16), cache_config=SimpleNamespace(cache_dtype="auto"),
    )  # fmt: skip
    return Layout.of(kv_caches, SimpleNamespace(kv_cache_groups=[group], num_blocks=BLOCKS), vllm_config)


def gathered(targets: Targets, block: int) -> bytes:
    return b"".join(
        ctypes.string_at(int(address), int(length))
        for address, length in zip(targets.addresses[block], targets.page_bytes, strict=True)
    )


@pytest.mark.parametrize("order", ORDERS)
def test_a_block_is_all_of_its_bytes_whatever_the_memory_order(order: str) -> None:
    kv_caches = caches(order)
    block = gathered(layout_of(kv_caches).targets([3, 1]), 0)
    expected = torch.cat([tensor[3].flatten() for tensor in kv_caches.values()])
    assert sorted(np.frombuffer(block, np.int16)) == sorted(expected.tolist())


def test_heads_outside_or_inside_of_blocks_make_no_difference() -> None:
    layouts = {order: layout_of(caches(order)) for order in ORDERS}
    assert layouts["LHBNC"].packing == layouts["BHLNC"].packing == layouts["LBHNC"].packing == layouts["BLHNC"].packing
    assert layouts["LBNHC"].packing == layouts["BLNHC"].packing != layouts["LBHNC"].packing
    # And so it is in memory: equal logical content, equal bytes.
    inside, outside = caches("LBHNC"), caches("LHBNC")
    for name, tensor in inside.items():
        outside[name].copy_(tensor)
    assert gathered(layouts["LBHNC"].targets([2]), 0) == gathered(layout_of(inside).targets([2]), 0)
    assert gathered(layout_of(outside).targets([2]), 0) == gathered(layout_of(inside).targets([2]), 0)


def test_a_contiguous_block_is_one_page_per_layer() -> None:
    assert len(layout_of(caches("LBHNC")).page_bytes) == LAYERS
    assert len(layout_of(caches("LHBNC")).page_bytes) == LAYERS * HEADS


def test_kernel_blocks_belong_to_the_block_that_they_split() -> None:
    tensor = torch.arange(BLOCKS * HEADS * TOKENS * CONTENT, dtype=torch.int16).reshape(BLOCKS * 2, HEADS, TOKENS // 2, CONTENT)
    pages, packing = pages_of(tensor, BLOCKS)
    assert pages == [(tensor.data_ptr(), HEADS * TOKENS * CONTENT * 2, HEADS * TOKENS * CONTENT * 2)]
    assert packing == "K2H2N2C6x2"


def test_dimensions_of_one_element_change_nothing() -> None:
    one = torch.zeros(BLOCKS, 1, TOKENS, CONTENT)
    assert pages_of(one, BLOCKS)[1] == pages_of(one.as_strided(one.shape, (24, 999, 6, 1)), BLOCKS)[1] == "N4C6x4"


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(BLOCKS * 2 + 1, HEADS, TOKENS, CONTENT), torch.zeros(1, HEADS, TOKENS, CONTENT).expand(BLOCKS, -1, -1, -1)],
    ids=["not a multiple of the blocks", "all blocks in one place"],
)
def test_what_cannot_be_addressed_is_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(NamespaceError):
        pages_of(tensor, BLOCKS)


def test_layers_of_another_group_are_refused_and_aliases_are_not() -> None:
    kv_caches = caches("LBHNC")
    assert layout_of(kv_caches | {"shares": kv_caches["layer.0"]}).block_bytes == layout_of(kv_caches).block_bytes
    with pytest.raises(NamespaceError, match="foreign"):
        layout_of(kv_caches | {"foreign": torch.zeros(1)})
    with pytest.raises(NamespaceError, match=r"layer\.1"):
        layout_of({name: tensor for name, tensor in kv_caches.items() if name != "layer.1"})


def test_a_block_of_another_size_than_vllm_says_is_refused() -> None:
    with pytest.raises(NamespaceError, match="where vLLM says"):
        layout_of(caches("LBHNC"), page_bytes=64)
