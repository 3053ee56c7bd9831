"""What the GPU tests share: the device, or why there is none, and paged KV caches of an 8B-class model in vLLM's memory orders.

How to run them is in README.md. With GPU_KIT_REHEARSAL=1 the CPU stands in for the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

REHEARSAL = os.environ.get("GPU_KIT_REHEARSAL") == "1"
# 32 layers, 8 KV heads of 128 (K and V), 16 tokens, bfloat16: pages of 64 KiB, blocks of 2 MiB.
LAYERS, BLOCKS, HEADS, TOKENS, CONTENT = (4, 24, 2, 4, 8) if REHEARSAL else (32, 96, 8, 16, 256)
SIZES = {"L": LAYERS, "B": BLOCKS, "H": HEADS, "N": TOKENS, "C": CONTENT}


def missing() -> str:
    """Why these tests cannot run here, or empty."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    return "" if REHEARSAL or torch.cuda.is_available() else "no GPU on this machine"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing()
    for item in items:
        if reason and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device() -> Any:
    import torch

    return torch.device("cpu") if REHEARSAL else torch.device("cuda", 0)


@pytest.fixture
def accelerator(device: Any) -> Any:
    """What a `Stager` works with, on this device."""
    from kvshare.integrations.vllm.pages import AtOnce, Cuda

    return AtOnce() if REHEARSAL else Cuda(device)


@dataclass
class Cache:
    """A KV cache: ``tensors`` as vLLM hands them over, [blocks, heads, tokens, content] per layer, random."""

    tensors: dict[str, Any]
    layout: Any
    pages: Any
    order: str

    @property
    def block_bytes(self) -> int:
        return int(self.layout.block_bytes)

    def content(self, block: int) -> bytes:
        """What a block is, by torch's own indexing."""
        import torch

        logical = torch.stack([tensor[block] for tensor in self.tensors.values()])
        if self.order.endswith("NHC"):
            logical = logical.permute(0, 2, 1, 3)
        return logical.contiguous().cpu().view(torch.int16).numpy().tobytes()

    def fill(self, blocks: list[int], value: int) -> None:
        """On the current stream, which is not waited for: an index made of ``blocks`` would be."""
        for tensor in self.tensors.values():
            for block in blocks:
                tensor[block].fill_(value)


@pytest.fixture
def make_cache(device: Any) -> Callable[[str], Cache]:
    """A cache in a memory order: where layers, blocks, heads, tokens and content lie, outermost first; "|": each layer in an
    allocation of its own."""
    import torch

    from kvshare.integrations.vllm.gather import PageRows
    from kvshare.integrations.vllm.layout import Layout, pages_of

    def make(order: str) -> Cache:
        generator = torch.Generator(device).manual_seed(len(order))

        def memory(dimensions: str) -> Any:
            shape = [SIZES[dimension] for dimension in dimensions]
            numbers = torch.randint(-9999, 9999, shape, dtype=torch.int16, device=device, generator=generator)
            return numbers.permute([dimensions.index(dimension) for dimension in "LBHNC" if dimension in dimensions])

        layers = [memory(order[1:]) for _ in range(LAYERS)] if order.startswith("|") else list(memory(order))
        tensors = {f"layer.{i}": layer for i, layer in enumerate(layers)}
        pages = [page for layer in layers for page in pages_of(layer, BLOCKS)[0]]
        columns = (np.array(column, np.uint64) for column in zip(*pages, strict=True))
        layout = Layout(*columns, "test", device.type)
        return Cache(tensors, layout, PageRows(layout, tensors), order)

    return make
