/* Validated reads of a mapped region: what `kvshare.region` writes down, read without Python. */
#ifndef KVSHARE_SLOTS_H
#define KVSHARE_SLOTS_H

#include <stddef.h>
#include <stdint.h>

/* A header's fields; kvshare/region.py has the format, tests/unit/test_native.py holds the two together. */
typedef struct {
    uint64_t generation;
    uint64_t checksum;
    uint32_t length;
    uint8_t rest[108];
} Header;

/* Load headers: checksums first, then the generations that vouch for them and for all that this thread read before. */
void load_headers(const Header *table, const int64_t *slots, size_t count, uint64_t *generations, uint64_t *checksums);

enum { STATUS_OK = 0, STATUS_STALE = 1, STATUS_CORRUPT = 2, STATUS_UNREACHABLE = 3 }; /* as in kvshare.transport.base */

/* The status of a block that landed. generation: as it is after that, checksum: as its header told before. A torn block has a
 * wrong digest as well, hence the order. Digest 0 was not made, by us, and the caller has to compare. */
uint8_t judge(uint64_t expected, uint64_t generation, uint64_t checksum, uint64_t digest, uint64_t length);

/* Does this slot hold a block of `length` bytes at that generation? Slots of any number may be asked for; those from `available`
 * on have no memory and are not touched. */
int slot_holds(const Header *table, uint64_t available, int64_t slot, uint64_t generation, uint64_t length);

typedef struct {
    const Header *table;
    const uint8_t *data;
    uint64_t slot_bytes;
    uint64_t available;
    const int64_t *slots;
    const uint64_t *expected; /* generations */
    const uint64_t *seeds;
    size_t count; /* blocks */
    const uint64_t *targets; /* pages of block 0, pages of block 1, ... */
    const uint64_t *page_bytes;
    size_t pages;
    uint8_t *statuses;   /* results, one per block */
    uint64_t *checksums; /* those that the headers of copied blocks told */
} SlotRead;

/* Copy the blocks that are there, digest what is copied, and judge; returns how many are OK. */
size_t read_slots(const SlotRead *read);

#endif
