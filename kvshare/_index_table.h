/* Memberships, the places that they have in common, and the nodes that these are of.
 *
 *     Entry -- place --> Place (node, region, length, high end of the generation) -- node --> Node (what it holds, by part)
 *
 * What is dropped dies at once: a place has a bit for each part, and an entry whose part's bit is set is not told, nor counted.
 * Its row is taken back when its bank is laid out anew, or by table_sweep. A place whose bits are not all zero takes no more
 * entries: what its node publishes then gets another place. A number is given again when no row has it any more.
 */
#ifndef KVSHARE_INDEX_TABLE_H
#define KVSHARE_INDEX_TABLE_H

#include "_index_banks.h"

#define NODES_MAX 65535 /* numbers are below */
#define NODE_PLACES_MAX 1024 /* a node needs one for each region and start; looked through one by one */
#define ALL_PARTS UINT64_MAX
#define RANK_NEVER 255
#define NONE UINT32_MAX

typedef struct {
    int64_t region, length;
    uint64_t epoch; /* the high end of its generations */
    uint32_t node;
    uint32_t entries;     /* rows that name it, dead ones too; 0: the number is free */
    uint32_t next;        /* place of this node, or free one; NONE: the last */
} Place;

typedef struct {
    uint64_t digests[PARTS];
    uint32_t held[PARTS]; /* entries alive */
    uint32_t first, places;
} Node;

typedef struct {
    Banks banks;
    Endings endings[BANKS]; /* of what is in the bank of this number */
    Place *places;
    uint64_t *dead;     /* for each place, a bit for each part */
    uint16_t *node_of;  /* for each place */
    uint32_t *answered; /* for each place, its number in the answer that is being made, from 1; 0 between answers */
    uint32_t places_count, places_room, places_free;
    Node **nodes; /* NULL: a number that was never used */
    uint32_t *depths; /* for each node; 0 between questions */
    uint32_t nodes_room;
    uint64_t keys_max, entries_max, keys, entries, dead_entries; /* keys and entries: with those that are dead */
    uint64_t version; /* of places, for who keeps something by their numbers */
    int any_dead;     /* places have bits set */
    int has_grown;    /* in this call, a bank: others wait for another one, if they can */
    int any_ends;     /* a block that ends was added once */
    uint32_t swept;   /* bank that table_sweep looks at next */
    Entry *kept;      /* room for laying out a bank */
    uint32_t kept_room;
    char *answers; /* room for an answer: fresh memory for each would take longer than the search */
    size_t answers_bytes;
} Table;

/* Columns of blocks of one region and length. */
typedef struct {
    const uint64_t *hashes;
    const uint32_t *slots;
    const uint64_t *generations;
    size_t count;
    int64_t region, length;
    uint32_t expires;
} Blocks;

/* Columns of an answer: room for as many locations as asked for. numbers: the places that `place` means. */
typedef struct {
    uint8_t *counts;
    uint16_t *place;
    uint32_t *slots, *expires, *numbers;
    uint64_t *generations;
    size_t locations, numbered;
    int any_ends;
} Answer;

Table *table_begin(uint64_t keys_max, uint64_t entries_max); /* NULL: no memory */
void table_end(Table *table);
size_t table_bytes(const Table *table);

int table_know(Table *table, uint32_t node); /* before the first use of a number below NODES_MAX. -1: no memory */
size_t table_add(Table *table, uint32_t node, const Blocks *blocks); /* returns how many were refused */
void table_remove(Table *table, uint32_t node, const uint64_t *hashes, size_t count);
void table_drop(Table *table, uint32_t node, uint64_t parts);
int table_sweep(Table *table, uint32_t banks); /* look at that many. Is anything left to be taken back? */

/* Questions. ranks: NULL, or one for each place; most: locations of a key, below 256. */
void table_find(const Table *table, const uint64_t *hashes, size_t count, const uint8_t *ranks, unsigned most, Answer *answer);
size_t table_held(const Table *table, const uint64_t *hashes, size_t count);
void table_holds(const Table *table, uint32_t node, const uint64_t *hashes, size_t count, uint8_t *out);

/* depths[node], zeroed by the caller afterwards: how many leading keys it holds. For the nodes put into `found`, which has room
 * for nodes_room; returns how many. */
uint32_t table_depths(const Table *table, const uint64_t *hashes, size_t count, uint32_t *found);

typedef void Complain(void *whom, const char *what, uint64_t where, uint64_t is, uint64_t should);
int table_check(const Table *table, Complain *complain, void *whom); /* -1: no memory for it */

/* Is this entry, of a bank or a hash in that bank's part, dead? */
static inline int is_dead(const Table *table, const Entry *entry, uint32_t bank)
{
    return (int)(table->dead[place_of(entry)] >> (bank >> (BANK_BITS - PART_BITS)) & 1);
}

static inline uint64_t mix(uint64_t value)
{
    for (int i = 0; i < 2; i++)
        value = (value ^ value >> 32) * 0xD6E8FEB86659FD93ULL;
    return value ^ value >> 32;
}

/* As `kvshare.fingerprints.digest`. */
static inline uint64_t digest_of(const Place *place, const Entry *entry, uint64_t hash)
{
    uint64_t generation = place->epoch << EPOCH_SHIFT | low_of(entry);
    return mix(hash + slot_of(entry) * 0x9FB21C651E98DF25ULL + generation * 0xC2B2AE3D27D4EB4FULL +
               (uint64_t)place->region * 0x165667B19E3779F9ULL);
}

static inline uint64_t ending_id(uint64_t hash, uint32_t node)
{
    return mix(hash + node);
}

/* Bring the rows of a key further on into the cache while those of this one are read: for questions into the second cache, for
 * changes, which need the lines to write to, into the first, and fewer at a time. */
#define AHEAD_ASKED 24
#define AHEAD_CHANGED 16

PREFETCHING void look_ahead(const Table *table, const uint64_t *hashes, size_t i, size_t count, size_t ahead)
{
    size_t end = i + ahead < count ? i + ahead + 1 : count;
    for (size_t j = i == 0 ? 0 : i + ahead; j < end; j++)
        bank_prefetch(&table->banks.all[bank_number(hashes[j])], hashes[j], ahead == AHEAD_CHANGED);
}

#endif
