#include "_index_table.h"

#include <stdlib.h>
#include <string.h>

Table *table_begin(uint64_t keys_max, uint64_t entries_max)
{
    Table *table = calloc(1, sizeof *table);
    if (table == NULL)
        return NULL;
    banks_begin(&table->banks, entries_max);
    table->keys_max = keys_max;
    table->entries_max = entries_max;
    table->places_free = NONE;
    return table;
}

void table_end(Table *table)
{
    banks_end(&table->banks);
    for (int i = 0; i < BANKS; i++)
        free(table->endings[i].rows);
    for (uint32_t i = 0; i < table->nodes_room; i++)
        free(table->nodes[i]);
    free(table->nodes);
    free(table->depths);
    free(table->places);
    free(table->dead);
    free(table->node_of);
    free(table->answered);
    free(table->kept);
    free(table->answers);
    free(table);
}

size_t table_bytes(const Table *table)
{
    size_t place_bytes = sizeof(Place) + sizeof *table->dead + sizeof *table->node_of + sizeof *table->answered;
    size_t bytes = sizeof *table + table->places_room * place_bytes + table->kept_room * sizeof(Entry) + table->answers_bytes;
    for (uint32_t i = 0; i < table->nodes_room; i++)
        bytes += sizeof(Node *) + sizeof(uint32_t) + (table->nodes[i] == NULL ? 0 : sizeof(Node));
    for (int i = 0; i < BANKS; i++)
        bytes += bank_bytes(&table->banks.all[i]) + table->endings[i].room * sizeof(Ending);
    return bytes;
}

static int grow(void *array, size_t room, size_t item)
{
    void *larger = realloc(*(void **)array, room * item);
    if (larger == NULL)
        return -1;
    *(void **)array = larger;
    return 0;
}

/* --- nodes and places ------------------------------------------------------------------------------------------- */

int table_know(Table *table, uint32_t node)
{
    if (node >= table->nodes_room) {
        uint32_t room = 2 * node + 16;
        if (grow(&table->nodes, room, sizeof(Node *)) < 0)
            return -1;
        memset(table->nodes + table->nodes_room, 0, (room - table->nodes_room) * sizeof(Node *));
        uint32_t known = table->nodes_room;
        if (grow(&table->depths, room, sizeof(uint32_t)) < 0)
            return -1;
        memset(table->depths + known, 0, (room - known) * sizeof(uint32_t));
        table->nodes_room = room;
    }
    if (table->nodes[node] == NULL) {
        table->nodes[node] = calloc(1, sizeof(Node));
        if (table->nodes[node] == NULL)
            return -1;
        table->nodes[node]->first = NONE;
    }
    return 0;
}

static int more_places(Table *table)
{
    uint32_t room = 2 * table->places_room + 64;
    if (grow(&table->places, room, sizeof(Place)) < 0 || grow(&table->dead, room, sizeof *table->dead) < 0 ||
        grow(&table->node_of, room, sizeof *table->node_of) < 0 || grow(&table->answered, room, sizeof *table->answered) < 0)
        return -1;
    table->places_room = room;
    return 0;
}

/* The number of a place that takes entries. NONE: there are too many. */
static uint32_t place_for(Table *table, uint32_t number, const Blocks *blocks, uint64_t epoch)
{
    Node *node = table->nodes[number];
    for (uint32_t at = node->first; at != NONE; at = table->places[at].next) {
        const Place *place = &table->places[at];
        if (place->region == blocks->region && place->length == blocks->length && place->epoch == epoch && !table->dead[at])
            return at;
    }
    if (node->places >= NODE_PLACES_MAX)
        return NONE;
    uint32_t made = table->places_free;
    if (made != NONE) {
        table->places_free = table->places[made].next;
    } else {
        made = table->places_count;
        if (made >= PLACES_MAX || (made >= table->places_room && more_places(table) < 0))
            return NONE;
        table->places_count++;
    }
    table->places[made] = (Place){blocks->region, blocks->length, epoch, number, 0, node->first};
    table->dead[made] = 0;
    table->node_of[made] = (uint16_t)number;
    table->answered[made] = 0;
    node->first = made;
    node->places++;
    table->version++;
    return made;
}

/* Its number is free if no row names this place. */
static void free_place(Table *table, uint32_t number)
{
    Place *place = &table->places[number];
    if (place->entries > 0)
        return;
    Node *node = table->nodes[place->node];
    uint32_t *link = &node->first;
    while (*link != number)
        link = &table->places[*link].next;
    *link = place->next;
    node->places--;
    place->next = table->places_free;
    table->places_free = number;
    table->dead[number] = 0;
    table->version++;
}

/* Places whose dead are all gone take entries again. */
static void settle(Table *table)
{
    if (table->dead_entries > 0 || !table->any_dead)
        return;
    memset(table->dead, 0, table->places_count * sizeof *table->dead);
    table->any_dead = 0;
    table->version++;
}

/* --- entries ---------------------------------------------------------------------------------------------------- */

static inline unsigned part_of(uint32_t bank)
{
    return bank >> (BANK_BITS - PART_BITS);
}

/* An entry is in no row any more: neither counted nor dead. */
static void forget(Table *table, const Entry *entry, uint32_t bank)
{
    uint32_t number = place_of(entry);
    Place *place = &table->places[number];
    if (is_dead(table, entry, bank)) {
        table->dead_entries--;
    } else {
        Node *node = table->nodes[place->node];
        node->held[part_of(bank)]--;
        node->digests[part_of(bank)] -= digest_of(place, entry, hash_of(entry, bank));
    }
    place->entries--;
    free_place(table, number);
}

/* These are in no row of the bank any more. In order, so that those of one key are neighbours. */
static void bury(Table *table, uint32_t number, const Entry *dead, uint32_t count)
{
    const Bank *bank = &table->banks.all[number];
    for (uint32_t i = 0; i < count; i++) {
        uint64_t hash = hash_of(&dead[i], number);
        endings_take(&table->endings[number], ending_id(hash, table->node_of[place_of(&dead[i])]));
        if (i + 1 == count || !is_of(&dead[i + 1], hash))
            table->keys -= !is_of(&bank->entries[bank_seek(bank, hash)], hash);
        forget(table, &dead[i], number);
    }
    table->entries -= count;
}

/* Lay out a bank anew, without its dead. -1: no memory, and nothing has changed. */
static int lay(Table *table, uint32_t number)
{
    Bank *bank = &table->banks.all[number];
    if (bank->count > table->kept_room) {
        uint32_t room = bank->count + bank->count / 8 + 256;
        if (grow(&table->kept, room, sizeof(Entry)) < 0)
            return -1;
        table->kept_room = room;
    }
    uint32_t count = bank->count, kept = 0, dead = 0;
    Entry *room = table->kept;
    if (table->dead_entries == 0) {
        for (const Entry *entry = bank->entries; kept < count; entry++) {
            room[kept] = *entry;
            kept += entry->key != GAP; /* no branch: nobody could foretell it */
        }
    }
    for (const Entry *entry = bank->entries; kept + dead < count; entry++) {
        if (entry->key == GAP)
            continue;
        if (is_dead(table, entry, number))
            dead++;
        else
            room[kept++] = *entry;
    }
    Entry *gone = room + kept; /* there is space for just as many */
    uint32_t found = 0;
    for (const Entry *entry = bank->entries; found < dead; entry++)
        if (entry->key != GAP && is_dead(table, entry, number))
            gone[found++] = *entry;
    if (bank_lay(&table->banks, number, table->kept, kept) < 0)
        return -1;
    bury(table, number, gone, dead);
    settle(table);
    return 0;
}

/* The row of a key's entry of this node, dead or not; NONE: it has none. `row` and `end`: of all entries of the key. */
static uint32_t find_mine(const Table *table, const Bank *bank, uint32_t node, uint64_t hash, uint32_t *row, uint32_t *end)
{
    uint32_t mine = NONE, at = *row = bank_seek(bank, hash);
    for (; is_of(&bank->entries[at], hash); at++)
        if (table->node_of[place_of(&bank->entries[at])] == node)
            mine = at;
    *end = at;
    return mine;
}

/* Into its row: a gap, or one that was opened for it; or from `mine`, where this node's entry of the key is so far. */
static void put(Table *table, uint32_t number, uint32_t row, uint32_t mine, const Entry *made)
{
    Bank *bank = &table->banks.all[number];
    Place *place = &table->places[place_of(made)];
    Node *node = table->nodes[place->node];
    place->entries++;
    node->held[part_of(number)]++;
    node->digests[part_of(number)] += digest_of(place, made, hash_of(made, number));
    if (mine == NONE) {
        table->entries++;
        bank->count++;
    } else { /* it has moved: to the front of its key's */
        Entry old = bank->entries[mine];
        memmove(bank->entries + row + 1, bank->entries + row, (mine - row) * sizeof(Entry));
        forget(table, &old, number);
    }
    bank->entries[row] = *made;
}

/* -1: refused. `epoch` and `place` are those of the block before, most likely this one's too. */
static int add_one(Table *table, uint32_t node, const Blocks *blocks, size_t i, uint64_t *epoch, uint32_t *place)
{
    uint64_t hash = blocks->hashes[i], generation = blocks->generations[i];
    uint32_t slot = blocks->slots[i], number = bank_number(hash), row, end;
    Bank *bank = &table->banks.all[number];
    if (slot >= SLOTS_MAX)
        return -1;
    if (bank_is_full(bank) && (!table->has_grown || bank_cannot_wait(bank))) {
        if (lay(table, number) < 0)
            return -1;
        table->has_grown = 1;
    }
    uint32_t mine = find_mine(table, bank, node, hash, &row, &end);
    if (mine == NONE && (table->entries >= table->entries_max || (row == end && table->keys >= table->keys_max)))
        return -1;
    if (*place == NONE || *epoch != generation >> EPOCH_SHIFT) {
        *epoch = generation >> EPOCH_SHIFT;
        *place = place_for(table, node, blocks, *epoch);
    }
    if (*place == NONE)
        return -1;
    if ((blocks->expires && endings_put(&table->endings[number], ending_id(hash, node), blocks->expires) < 0) ||
        (mine == NONE && bank_open(&table->banks, number, row) < 0)) {
        free_place(table, *place);
        *place = NONE;
        return -1;
    }
    if (!blocks->expires && table->any_ends)
        endings_take(&table->endings[number], ending_id(hash, node));
    Entry made = make_entry(hash, *place, slot, generation);
    table->keys += row == end;
    put(table, number, row, mine, &made);
    return 0;
}

size_t table_add(Table *table, uint32_t node, const Blocks *blocks)
{
    size_t refused = 0;
    uint64_t epoch = 0;
    uint32_t place = NONE;
    table->any_ends |= blocks->expires != 0;
    table->has_grown = 0;
    for (size_t i = 0; i < blocks->count; i++) {
        look_ahead(table, blocks->hashes, i, blocks->count, AHEAD_CHANGED);
        refused += add_one(table, node, blocks, i, &epoch, &place) < 0;
    }
    settle(table);
    return refused;
}

static void remove_one(Table *table, uint32_t node, uint64_t hash)
{
    uint32_t number = bank_number(hash), row, end;
    Bank *bank = &table->banks.all[number];
    uint32_t mine = find_mine(table, bank, node, hash, &row, &end);
    if (mine == NONE || is_dead(table, &bank->entries[mine], number))
        return;
    if (table->any_ends)
        endings_take(&table->endings[number], ending_id(hash, node));
    forget(table, &bank->entries[mine], number);
    bank_close(bank, mine);
    bank->count--;
    table->entries--;
    table->keys -= row + 1 == end;
    if (bank_is_sparse(&table->banks, number))
        lay(table, number); /* without memory for it, it stays as it is */
}

void table_remove(Table *table, uint32_t node, const uint64_t *hashes, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        look_ahead(table, hashes, i, count, AHEAD_CHANGED);
        remove_one(table, node, hashes[i]);
    }
}

void table_drop(Table *table, uint32_t number, uint64_t parts)
{
    Node *node = table->nodes[number];
    for (uint32_t at = node->first; at != NONE; at = table->places[at].next)
        table->dead[at] |= parts;
    for (unsigned part = 0; part < PARTS; part++) {
        if (!(parts >> part & 1))
            continue;
        table->dead_entries += node->held[part];
        node->held[part] = 0;
        node->digests[part] = 0;
    }
    table->any_dead = 1;
    table->version++;
    settle(table);
}

static int has_dead(const Table *table, uint32_t number)
{
    const Bank *bank = &table->banks.all[number];
    const Entry *entry = bank->entries;
    for (uint32_t seen = 0; seen < bank->count; entry++) {
        if (entry->key == GAP)
            continue;
        if (is_dead(table, entry, number))
            return 1;
        seen++;
    }
    return 0;
}

int table_sweep(Table *table, uint32_t banks)
{
    for (; banks > 0 && table->dead_entries > 0; banks--) {
        if (has_dead(table, table->swept))
            lay(table, table->swept); /* without memory for it, another time */
        table->swept = (table->swept + 1) % BANKS;
    }
    return table->dead_entries > 0;
}
