/* The memory of the index: 256 arrays of memberships ("a node holds a key"), each sorted by the hash of the key.
 *
 *     hash:  | bank (8 bits) | where in it, about (56)             |
 *     bank:  [ e e . . | e e e . | e e e e | e . . . ]   entries in order of their hashes, as near behind their homes as there
 *                        ^home                           is room. home = 4 x (hash x lines >> 64), the first row of a cache
 *                                                        line: monotone, so that any number of lines will do, and growth by a
 *                                                        quarter is one pass from front to back
 *
 * Between the home of an entry and the entry there is no gap, and the last row is always one: a search runs forward from the
 * home and ends at the first entry that isn't smaller. Entries of one key are neighbours, the freshest first.
 */
#ifndef KVSHARE_INDEX_BANKS_H
#define KVSHARE_INDEX_BANKS_H

#include <stddef.h>
#include <stdint.h>

#define BANK_BITS 8
#define BANKS (1 << BANK_BITS)
#define PART_BITS 6 /* the top of the hash, as in kvshare/fingerprints.py */
#define PARTS (1 << PART_BITS)
#define PLACE_BITS 17
#define PLACE_LOW ((1U << BANK_BITS) - 1)
#define PLACE_HIGH_BITS (PLACE_BITS - BANK_BITS)
#define PLACES_MAX (1U << PLACE_BITS)
#define SLOT_BITS 28
#define SLOTS_MAX (1U << SLOT_BITS)
#define HALF_BITS (64 - SLOT_BITS - PLACE_HIGH_BITS)
#define EPOCH_SHIFT (HALF_BITS + 1) /* 28: what a generation has above, its place tells */
#define GAP UINT64_MAX /* `key` of a row that holds nothing: no hash has 52 ones at its end */

/* 16 bytes. key: the hash without what its bank says of it (56 bits), then the low 8 bits of the place. where: slot (28 bits),
 * half the low end of the generation, which is even (27), the high bits of the place (9). */
typedef struct {
    uint64_t key, where;
} Entry;

typedef struct {
    Entry *entries;
    uint32_t homes, room;  /* homes: whole lines; room: rows, more than homes */
    uint32_t count, limit; /* limit: more entries ask for more homes */
    uint32_t huge;         /* so many huge pages it begins with; the rest lies in small ones */
} Bank;

/* Small banks lie in the heap. Larger ones have each its range of addresses in one area, in which it grows in place: moving it
 * would have the processor forget addresses at every step. What fills huge pages (2 MiB) of it lies in such. */
typedef struct {
    Bank all[BANKS];
    char *mapped, *area;  /* NULL until a bank needs it; the area begins with a huge page, a little behind what is mapped */
    size_t reserve_bytes; /* of each bank in it; addresses, not memory */
} Banks;

/* When blocks end, for the few that do: open addressing by a mix of hash and node. */
typedef struct {
    uint64_t id;
    uint32_t expires; /* 0: an empty row */
} Ending;

typedef struct {
    Ending *rows;
    uint32_t room, count; /* room: a power of two, or 0 */
} Endings;

static inline uint32_t bank_number(uint64_t hash)
{
    return (uint32_t)(hash >> (64 - BANK_BITS));
}

static inline uint32_t place_of(const Entry *entry)
{
    return (uint32_t)(entry->key & PLACE_LOW) | (uint32_t)(entry->where & ((1U << PLACE_HIGH_BITS) - 1)) << BANK_BITS;
}

static inline uint32_t slot_of(const Entry *entry)
{
    return (uint32_t)(entry->where >> (64 - SLOT_BITS));
}

static inline uint32_t low_of(const Entry *entry) /* the low end of its generation */
{
    return (uint32_t)(entry->where << SLOT_BITS >> (64 - HALF_BITS)) << 1;
}

static inline uint64_t hash_of(const Entry *entry, uint32_t bank)
{
    return (uint64_t)bank << (64 - BANK_BITS) | entry->key >> BANK_BITS;
}

static inline Entry make_entry(uint64_t hash, uint32_t place, uint32_t slot, uint64_t generation)
{
    Entry entry = {hash << BANK_BITS | (place & PLACE_LOW),
                   (uint64_t)slot << (64 - SLOT_BITS) | generation >> 1 << (64 - HALF_BITS) >> SLOT_BITS | place >> BANK_BITS};
    return entry;
}

static inline int is_of(const Entry *entry, uint64_t hash)
{
    return entry->key >> BANK_BITS == hash << BANK_BITS >> BANK_BITS;
}

static inline int is_before(const Entry *entry, uint64_t hash) /* a gap is not */
{
    return entry->key < hash << BANK_BITS;
}

#define LINE_ROWS 4
#define LINES_TO_ASK 3 /* brought into the cache ahead of the search */
#define LINES_TO_CHANGE 4
#define LINES_NEAR 4 /* looked through one by one; then in leaps: the keys before may have a thousand holders each */

static inline uint32_t home_of(uint64_t homes, uint64_t hash)
{
    return (uint32_t)((unsigned __int128)(hash << BANK_BITS) * (homes / LINE_ROWS) >> 64) * LINE_ROWS;
}

static inline uint32_t home_of_entry(uint64_t homes, const Entry *entry)
{
    return home_of(homes, entry->key >> BANK_BITS);
}

/* GCC takes functions that only prefetch for ones without effect, and leaves their calls out, unless they are inlined early. */
#define PREFETCHING static inline __attribute__((always_inline))

/* Most searches end in the first two of these lines, most insertions in the third or fourth. `near`: into the first cache;
 * it can wait for fewer lines at a time than the second. */
PREFETCHING void bank_prefetch(const Bank *bank, uint64_t hash, int near)
{
    const Entry *home = bank->entries + home_of(bank->homes, hash);
    for (int line = 0; line < (near ? LINES_TO_CHANGE : LINES_TO_ASK); line++) {
        if (near)
            __builtin_prefetch(home + line * LINE_ROWS);
        else
            __builtin_prefetch(home + line * LINE_ROWS, 0, 2);
    }
}

void banks_begin(Banks *banks, uint64_t entries_max);
void banks_end(Banks *banks);

static inline int bank_is_full(const Bank *bank)
{
    return bank->count >= bank->limit;
}

static inline int bank_cannot_wait(const Bank *bank) /* another call's time to grow would be too late */
{
    return bank->count >= bank->limit + bank->limit / 16;
}

static inline size_t bank_bytes(const Bank *bank)
{
    return bank->count == 0 && bank->homes == 1 ? 0 : bank->room * sizeof(Entry);
}

/* bank_seek where it is none of the lines up to `row`. */
uint32_t bank_leap(const Bank *bank, uint64_t hash, uint32_t row);

/* The row of the first entry that is not before this hash, or of the gap where it belongs. Within a line without branches:
 * nobody could foretell which way they go. */
static inline uint32_t bank_seek(const Bank *bank, uint64_t hash)
{
    uint32_t row = home_of(bank->homes, hash);
    for (int line = 0; line < LINES_NEAR; line++, row += LINE_ROWS) {
        const Entry *entry = bank->entries + row;
        uint32_t before = is_before(entry, hash) + is_before(entry + 1, hash) + is_before(entry + 2, hash);
        before += is_before(entry + 3, hash);
        if (before < LINE_ROWS)
            return row + before;
    }
    return bank_leap(bank, hash, row);
}

/* Move what lies at `row` of a bank, and behind it, by one. -1: no memory. */
int bank_open(Banks *banks, uint32_t number, uint32_t row);
void bank_close(Bank *bank, uint32_t row); /* the opposite: its entry is gone */

int bank_is_sparse(const Banks *banks, uint32_t number); /* memory could be given back */

/* Lay out `count` entries, in order, with as many homes as they should have, instead of what was there. -1: no memory, and
 * nothing has changed. */
int bank_lay(Banks *banks, uint32_t number, const Entry *entries, uint32_t count);

uint32_t endings_get(const Endings *endings, uint64_t id);        /* 0: none */
int endings_put(Endings *endings, uint64_t id, uint32_t expires); /* -1: no memory */
void endings_take(Endings *endings, uint64_t id);

#endif
