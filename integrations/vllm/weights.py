"""Identity of weights, from their bytes: equal on every host, whatever path, name or date they have.

Up to 1 GiB every byte is hashed. Beyond that, reading all would delay an engine's start, so that every tensor is sampled:
tensors of up to 64 KiB whole, larger ones at 16 places. A change that touches only few elements of a large tensor (added
tokens' rows in an embedding, say) can then go unseen: name the weights yourself in such a case (``"weights"`` in vLLM's
``kv_connector_extra_config``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import xxhash

from kvshare.errors import NamespaceError

FULL_BYTES_MAX = 1 << 30
WHOLE_TENSOR_BYTES_MAX = 64 << 10
SAMPLES = 16  # of a larger tensor
SAMPLE_BYTES = 4096
FILE_SAMPLES = 1024  # of a file whose tensors we cannot tell apart
HEADER_BYTES_MAX = 256 << 20
# In the order in which vLLM prefers them; the first kind that is there is what it loads.
KINDS = (("*.safetensors",), ("*.bin", "*.pt", "*.pth"), ("*.gguf",))


def digest_of(path: Path, extra: Iterable[str] = ()) -> str:
    """Digest of the weights at ``path``, a file or a directory of files; ``extra`` names further small files to include.

    Raises:
        NamespaceError: there are no weights in a format we know.
    """
    files = [path] if path.is_file() else _weight_files(path)
    if not files:
        raise NamespaceError(f"no weights found in {path}")
    whole = sum(file.stat().st_size for file in files) <= FULL_BYTES_MAX
    digest = hashlib.blake2b(digest_size=16)
    for file in [*files, *(path / name for name in sorted(extra) if (path / name).is_file())]:
        size = file.stat().st_size
        # A lone file's name is a name for the model, not part of the weights.
        name = "" if file == path else file.name
        digest.update(f"{name}|{size}|".encode())
        digest.update(_content(file, size, whole))
    return digest.hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    for patterns in KINDS:
        found = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
        if found:
            return found
    return []


def _content(file: Path, size: int, whole: bool) -> bytes:
    content = xxhash.xxh3_128()
    with file.open("rb") as stream:
        if whole:
            while piece := stream.read(1 << 20):
                content.update(piece)
        else:
            for start, length in _samples(file, size):
                stream.seek(start)
                content.update(stream.read(length))
    return content.digest()


def _samples(file: Path, size: int) -> Iterator[tuple[int, int]]:
    """Ranges (start, length) of a large file that stand for the whole."""
    if file.suffix != ".safetensors":
        yield from _spread(0, size, FILE_SAMPLES)
        return
    base, ranges = _tensors(file, size)
    yield 0, base
    for begin, end in ranges:
        yield from _spread(base + begin, base + end, SAMPLES)


def _spread(begin: int, end: int, samples: int) -> Iterator[tuple[int, int]]:
    if end - begin <= WHOLE_TENSOR_BYTES_MAX:
        yield begin, end - begin
        return
    last = end - SAMPLE_BYTES
    for i in range(samples):
        yield begin + (last - begin) * i // (samples - 1), SAMPLE_BYTES


def _tensors(file: Path, size: int) -> tuple[int, list[tuple[int, int]]]:
    """Where a safetensors file's data begin, and each tensor's range in them. Raises NamespaceError for a damaged file."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= min(HEADER_BYTES_MAX, size - 8):
            raise NamespaceError(f"{file.name} is no safetensors file")
        try:
            header = json.loads(stream.read(length))
            ranges = sorted(tuple(tensor["data_offsets"]) for name, tensor in header.items() if name != "__metadata__")
        except (ValueError, TypeError, KeyError) as error:
            raise NamespaceError(f"{file.name} has a damaged header: {error}") from error
    return 8 + length, ranges
