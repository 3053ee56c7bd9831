#include "_slots.h"

#include "_moves.h"

#define FORESEEN_BYTES 1024

_Static_assert(sizeof(Header) == 128, "two cache lines");

void load_headers(const Header *table, const int64_t *slots, size_t count, uint64_t *generations, uint64_t *checksums)
{
    for (size_t i = 0; i < count; i++)
        checksums[i] = table[slots[i]].checksum;
    /* Loads from before must be over: an acquire load alone lets them sink below itself. */
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    for (size_t i = 0; i < count; i++)
        generations[i] = __atomic_load_n(&table[slots[i]].generation, __ATOMIC_ACQUIRE);
}

int slot_holds(const Header *table, uint64_t available, int64_t slot, uint64_t generation, uint64_t length)
{
    if (slot < 0 || (uint64_t)slot >= available || generation == 0 || generation % 2 != 0)
        return 0;
    return __atomic_load_n(&table[slot].generation, __ATOMIC_ACQUIRE) == generation && table[slot].length == length;
}

/* The processor foresees the bytes of a block, but not where the next block lies. */
static void foresee(const SlotRead *read, size_t block)
{
    if (block >= read->count || (uint64_t)read->slots[block] >= read->available)
        return;
    uint64_t slot = (uint64_t)read->slots[block];
    __builtin_prefetch(&read->table[slot]);
    for (size_t at = 0; at < FORESEEN_BYTES && at < read->slot_bytes; at += 64)
        __builtin_prefetch(read->data + slot * read->slot_bytes + at);
}

uint8_t judge(uint64_t expected, uint64_t generation, uint64_t checksum, uint64_t digest, uint64_t length)
{
    if (generation != expected)
        return STATUS_STALE;
    return length < XXH3_LENGTH_MIN || checksum == digest ? STATUS_OK : STATUS_CORRUPT;
}

static uint8_t read_slot(const SlotRead *read, size_t block, uint64_t length, int stream)
{
    int64_t slot = read->slots[block];
    uint64_t expected = read->expected[block], digest, generation;
    read->checksums[block] = 0;
    if (length > read->slot_bytes || !slot_holds(read->table, read->available, slot, expected, length))
        return STATUS_STALE;
    copy_block(read->targets + block * read->pages, read->data + (uint64_t)slot * read->slot_bytes, read->page_bytes,
               read->pages, read->seeds[block], &digest, stream);
    load_headers(read->table, &slot, 1, &generation, &read->checksums[block]);
    return judge(expected, generation, read->checksums[block], digest, length);
}

size_t read_slots(const SlotRead *read)
{
    uint64_t length = 0;
    size_t ok = 0;
    for (size_t page = 0; page < read->pages; page++)
        length += read->page_bytes[page];
    int stream = length * read->count >= STREAM_BYTES_MIN;
    for (size_t block = 0; block < read->count; block++) {
        foresee(read, block + 1);
        read->statuses[block] = read_slot(read, block, length, stream);
        ok += read->statuses[block] == STATUS_OK;
    }
    if (stream)
        xxh3_fence();
    return ok;
}
