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

void read_slots(const SlotRead *read)
{
    uint64_t length = 0;
    for (size_t page = 0; page < read->pages; page++)
        length += read->page_bytes[page];
    int stream = length * read->count >= STREAM_BYTES_MIN;
    for (size_t block = 0; block < read->count; block++) {
        foresee(read, block + 1);
        if (length > read->slot_bytes || 
            !slot_holds(read->table, read->available, read->slots[block], read->expected[block], length)) {
            read->generations[block] = ~read->expected[block];
            continue;
        }
        uint64_t slot = (uint64_t)read->slots[block];
        copy_block(read->targets + block * read->pages, read->data + slot * read->slot_bytes, read->page_bytes, read->pages,
                   read->seeds[block], &read->digests[block], stream);
        load_headers(read->table, &read->slots[block], 1, &read->generations[block], &read->checksums[block]);
    }
    if (stream)
        xxh3_fence();
}
