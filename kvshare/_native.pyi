from typing import Any

def copy_ranges(targets: Any, sources: Any, lengths: Any) -> None: ...
def copy_blocks(targets: Any, lengths: Any, sources: Any, pages: int, seeds: Any, digests: Any) -> None: ...
def send_ranges(fd: int, addresses: Any, lengths: Any, seconds: float) -> int: ...
def recv_ranges(fd: int, addresses: Any, lengths: Any, seconds: float) -> int: ...
def read_slots(
    table: int,
    data: int,
    slot_bytes: int,
    available: int,
    expected: Any,
    seeds: Any,
    checksums: Any,
    slots: Any,
    targets: Any,
    page_bytes: Any,
    statuses: Any,
) -> int: ...
def send_slots(
    fd: int,
    seconds: float,
    table: int,
    data: int,
    slot_bytes: int,
    available: int,
    slots: Any,
    expected: Any,
    length: int,
    portion_blocks: int,
) -> int: ...
def recv_slots(
    fd: int,
    seconds: float,
    portion_blocks: int,
    expected: Any,
    seeds: Any,
    checksums: Any,
    targets: Any,
    page_bytes: Any,
    statuses: Any,
) -> int: ...
def read_process(pid: int, targets: Any, sources: Any, lengths: Any) -> int: ...
def load_generations(table_address: int, stride: int, slots: Any, out: Any) -> None: ...
def store_generation(address: int, value: int) -> None: ...
def view(address: int, length: int, writable: bool) -> memoryview: ...
def address_of(buffer: Any) -> int: ...
