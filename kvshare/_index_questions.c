/* Questions to a table: they change nothing that anybody could see. */
#include "_index_table.h"

#include <stdlib.h>
#include <string.h>

/* The first entry of a key; those behind it, as long as they are its own, are the others. */
static inline const Entry *entries_of(const Table *table, uint64_t hash)
{
    const Bank *bank = &table->banks.all[bank_number(hash)];
    return bank->entries + bank_seek(bank, hash);
}

/* --- where keys are --------------------------------------------------------------------------------------------- */

/* Those of a key's entries, from the first on, that are to be told, best first: at most `most`. */
static unsigned choose(const Table *table, const Entry *entry, uint64_t hash, const uint8_t *ranks, unsigned most,
                       const Entry **chosen)
{
    uint8_t ranked[RANK_NEVER];
    unsigned count = 0;
    for (; is_of(entry, hash); entry++) {
        if (is_dead(table, entry, bank_number(hash)))
            continue;
        uint8_t rank = ranks == NULL ? 0 : ranks[place_of(entry)];
        if (rank == RANK_NEVER || (count == most && rank >= ranked[count - 1]))
            continue;
        unsigned at = count < most ? count++ : most - 1;
        for (; at > 0 && ranked[at - 1] > rank; at--) {
            ranked[at] = ranked[at - 1];
            chosen[at] = chosen[at - 1];
        }
        ranked[at] = rank;
        chosen[at] = entry;
    }
    return count;
}

/* The number of a place in the answer, from 1; 0: it names too many already. */
static uint32_t number_of(const Table *table, uint32_t place, Answer *answer)
{
    if (table->answered[place] == 0 && answer->numbered <= UINT16_MAX) {
        answer->numbers[answer->numbered++] = place;
        table->answered[place] = (uint32_t)answer->numbered;
    }
    return table->answered[place];
}

static inline unsigned tell(const Table *table, const Entry *entry, uint64_t hash, Answer *answer)
{
    uint32_t place = place_of(entry), number = table->answered[place];
    if (number == 0 && (number = number_of(table, place, answer)) == 0)
        return 0;
    size_t at = answer->locations++;
    answer->place[at] = (uint16_t)(number - 1);
    answer->slots[at] = slot_of(entry);
    answer->generations[at] = table->places[place].epoch << EPOCH_SHIFT | low_of(entry);
    if (table->any_ends) {
        answer->expires[at] = endings_get(&table->endings[bank_number(hash)], ending_id(hash, table->node_of[place]));
        answer->any_ends |= answer->expires[at] != 0;
    }
    return 1;
}

void table_find(const Table *table, const uint64_t *hashes, size_t count, const uint8_t *ranks, unsigned most, Answer *answer)
{
    const Entry *chosen[RANK_NEVER];
    for (size_t i = 0; i < count; i++) {
        look_ahead(table, hashes, i, count, AHEAD_ASKED);
        uint64_t hash = hashes[i];
        const Entry *entry = entries_of(table, hash);
        unsigned told = 0;
        if (is_of(entry, hash) && !is_of(entry + 1, hash)) { /* one holder, as most keys have */
            int dead = table->any_dead && is_dead(table, entry, bank_number(hash));
            if (!dead && (ranks == NULL || ranks[place_of(entry)] != RANK_NEVER))
                told = tell(table, entry, hash, answer);
        } else {
            unsigned count_chosen = choose(table, entry, hash, ranks, most, chosen);
            for (unsigned j = 0; j < count_chosen; j++)
                told += tell(table, chosen[j], hash, answer);
        }
        answer->counts[i] = (uint8_t)told;
    }
    for (size_t i = 0; i < answer->numbered; i++)
        table->answered[answer->numbers[i]] = 0;
}

/* --- who holds them --------------------------------------------------------------------------------------------- */

size_t table_held(const Table *table, const uint64_t *hashes, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        look_ahead(table, hashes, i, count, AHEAD_ASKED);
        const Entry *entry = entries_of(table, hashes[i]);
        while (is_of(entry, hashes[i]) && is_dead(table, entry, bank_number(hashes[i])))
            entry++;
        if (!is_of(entry, hashes[i]))
            return i;
    }
    return count;
}

void table_holds(const Table *table, uint32_t node, const uint64_t *hashes, size_t count, uint8_t *out)
{
    for (size_t i = 0; i < count; i++) {
        look_ahead(table, hashes, i, count, AHEAD_ASKED);
        out[i] = 0;
        for (const Entry *entry = entries_of(table, hashes[i]); is_of(entry, hashes[i]); entry++)
            if (table->node_of[place_of(entry)] == node)
                out[i] = !is_dead(table, entry, bank_number(hashes[i]));
    }
}

uint32_t table_depths(const Table *table, const uint64_t *hashes, size_t count, uint32_t *found)
{
    uint32_t nodes = 0, going_on = 1;
    for (size_t i = 0; i < count && going_on > 0; i++) {
        look_ahead(table, hashes, i, count, AHEAD_ASKED);
        going_on = 0;
        for (const Entry *entry = entries_of(table, hashes[i]); is_of(entry, hashes[i]); entry++) {
            uint32_t node = table->node_of[place_of(entry)];
            if (table->depths[node] != i || is_dead(table, entry, bank_number(hashes[i])))
                continue;
            table->depths[node]++;
            going_on++;
            if (i == 0)
                found[nodes++] = node;
        }
    }
    return nodes;
}

/* --- whether all is well ---------------------------------------------------------------------------------------- */

typedef struct {
    uint64_t keys, entries, dead, endings;
    Node *nodes;       /* counted anew */
    uint32_t *entries_of; /* for each place */
} Counted;

/* One entry, alive or dead, in the books. */
static void count_entry(const Table *table, const Entry *entry, uint32_t number, Counted *counted)
{
    uint32_t place = place_of(entry), node = table->node_of[place];
    uint64_t hash = hash_of(entry, number);
    counted->entries_of[place]++;
    counted->endings += endings_get(&table->endings[number], ending_id(hash, node)) != 0;
    if (is_dead(table, entry, number)) {
        counted->dead++;
        return;
    }
    unsigned part = (unsigned)(hash >> (64 - PART_BITS));
    counted->nodes[node].held[part]++;
    counted->nodes[node].digests[part] += digest_of(&table->places[place], entry, hash);
}

static void check_bank(const Table *table, uint32_t number, Counted *counted, Complain *complain, void *whom)
{
    const Bank *bank = &table->banks.all[number];
    uint64_t count = 0, last_gap = NONE;
    const Entry *before = NULL;
    for (uint32_t row = 0; row < bank->room; row++) {
        const Entry *entry = &bank->entries[row];
        if (entry->key == GAP) {
            last_gap = row;
            continue;
        }
        uint32_t home = home_of_entry(bank->homes, entry);
        uint64_t hash = hash_of(entry, number);
        count++;
        if (home > row || (last_gap != NONE && last_gap >= home))
            complain(whom, "an entry cannot be found from its home", number, row, home);
        if (before != NULL && !is_before(before, hash) && !is_of(before, hash))
            complain(whom, "an entry is out of order", number, row, row);
        counted->keys += before == NULL || !is_of(before, hash);
        before = entry;
        if (place_of(entry) >= table->places_count)
            complain(whom, "an entry has no place", number, row, place_of(entry));
        else
            count_entry(table, entry, number, counted);
    }
    if (last_gap != bank->room - 1)
        complain(whom, "the last row of a bank is taken", number, bank->room, bank->room);
    if (count != bank->count)
        complain(whom, "a bank miscounts its entries", number, bank->count, count);
    if (counted->endings != table->endings[number].count)
        complain(whom, "a bank knows ends of no blocks", number, table->endings[number].count, counted->endings);
    counted->endings = 0;
    counted->entries += count;
}

static void compare(const Table *table, const Counted *counted, Complain *complain, void *whom)
{
    for (uint32_t i = 0; i < table->places_count; i++)
        if (table->places[i].entries != counted->entries_of[i])
            complain(whom, "a place miscounts its entries", i, table->places[i].entries, counted->entries_of[i]);
    for (uint32_t i = 0; i < table->nodes_room; i++) {
        const Node *node = table->nodes[i], *should = &counted->nodes[i];
        if (node == NULL)
            continue;
        for (unsigned part = 0; part < PARTS; part++) {
            if (node->held[part] != should->held[part])
                complain(whom, "a node miscounts what it holds", i, node->held[part], should->held[part]);
            if (node->digests[part] != should->digests[part])
                complain(whom, "a node's digest is wrong", i, node->digests[part], should->digests[part]);
        }
        uint32_t places = 0;
        for (uint32_t at = node->first; at != NONE && places <= node->places; at = table->places[at].next)
            places++;
        if (places != node->places)
            complain(whom, "a node miscounts its places", i, node->places, places);
    }
    if (table->keys != counted->keys)
        complain(whom, "keys are miscounted", 0, table->keys, counted->keys);
    if (table->entries != counted->entries)
        complain(whom, "entries are miscounted", 0, table->entries, counted->entries);
    if (table->dead_entries != counted->dead)
        complain(whom, "dead entries are miscounted", 0, table->dead_entries, counted->dead);
    if (table->keys > table->keys_max || table->entries > table->entries_max)
        complain(whom, "there are more keys or entries than may be", 0, table->entries, table->entries_max);
}

int table_check(const Table *table, Complain *complain, void *whom)
{
    Counted counted = {0, 0, 0, 0, NULL, NULL};
    counted.nodes = calloc((size_t)table->nodes_room + 1, sizeof(Node));
    counted.entries_of = calloc((size_t)table->places_count + 1, sizeof(uint32_t));
    int result = -1;
    if (counted.nodes != NULL && counted.entries_of != NULL) {
        for (uint32_t i = 0; i < BANKS; i++)
            check_bank(table, i, &counted, complain, whom);
        compare(table, &counted, complain, whom);
        result = 0;
    }
    free(counted.nodes);
    free(counted.entries_of);
    return result;
}
