#define _GNU_SOURCE /* MAP_ANONYMOUS, madvise */
#include "_index_banks.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE_BYTES 4096
#define HUGE_BYTES (2UL << 20)
#define UNIT_BYTES 256   /* in the heap */
#define HEAP_BYTES 16384 /* more than this lie in the area */
#define TAIL_ROWS 16     /* for entries whose homes are the last ones; more are added when those are taken */
#define FULL 196         /* of 256: 0.77. A search passes 2 rows on average, an insertion moves 10 */
#define GROWTH 64        /* of 256: by a quarter, to 0.61 full. In the mean of all sizes between, 23.4 bytes an entry */
#define SPARSE (FULL * 256 / (256 + GROWTH) * 9 / 10)
#define LEAST 16 /* rows of the smallest size */
#define ENDINGS_MIN 16

static Entry NOTHING[4] = {{GAP, GAP}, {GAP, GAP}, {GAP, GAP}, {GAP, GAP}}; /* of all banks without memory: never written */

void banks_begin(Banks *banks, uint64_t entries_max)
{
    for (int i = 0; i < BANKS; i++)
        banks->all[i] = (Bank){NOTHING, 1, 1, 0, 0, 0};
    uint64_t share = entries_max / BANKS * sizeof(Entry) * 256 / FULL * (256 + GROWTH) / 256;
    banks->mapped = banks->area = NULL;
    banks->reserve_bytes = (2 * share / HUGE_BYTES + 1) * HUGE_BYTES;
}

static Entry *range_of(const Banks *banks, uint32_t number)
{
    return banks->area == NULL ? NULL : (Entry *)(banks->area + number * banks->reserve_bytes);
}

void banks_end(Banks *banks)
{
    for (uint32_t i = 0; i < BANKS; i++)
        if (banks->all[i].entries != NOTHING && banks->all[i].entries != range_of(banks, i))
            free(banks->all[i].entries);
    if (banks->area != NULL)
        munmap(banks->mapped, BANKS * banks->reserve_bytes + HUGE_BYTES);
}

static size_t bytes_for(uint64_t rows)
{
    size_t bytes = rows * sizeof(Entry), unit = bytes <= HEAP_BYTES ? UNIT_BYTES : PAGE_BYTES;
    return (bytes + unit - 1) / unit * unit;
}

/* Let what lies in whole huge pages lie in huge pages, but for one more than before: clearing one takes as long as all else.
 * Where that is new, all that was there is lost. */
static void fit_pages(Bank *bank, Entry *range, size_t bytes)
{
    uint32_t huge = (uint32_t)(bytes / HUGE_BYTES), less = huge < bank->huge ? huge : bank->huge;
    huge = huge > bank->huge + 1 ? bank->huge + 1 : huge;
    size_t changing = (huge + bank->huge - 2 * less) * HUGE_BYTES;
    if (changing == 0)
        return;
    char *begin = (char *)range + less * HUGE_BYTES;
    madvise(begin, changing, MADV_DONTNEED);
    madvise(begin, changing, huge > less ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    bank->huge = huge;
}

static Entry *resize_in_heap(Bank *bank, Entry *range, size_t bytes)
{
    if (bank->entries == NOTHING)
        return malloc(bytes);
    if (bank->entries != range)
        return realloc(bank->entries, bytes);
    Entry *made = malloc(bytes);
    if (made != NULL) {
        memcpy(made, range, bytes);
        madvise(range, bank_bytes(bank), MADV_DONTNEED);
        fit_pages(bank, range, 0);
    }
    return made;
}

static Entry *resize_in_area(Banks *banks, uint32_t number, size_t bytes)
{
    Bank *bank = &banks->all[number];
    if (bytes > banks->reserve_bytes)
        return NULL;
    if (banks->area == NULL) {
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void *made = mmap(NULL, BANKS * banks->reserve_bytes + HUGE_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (made == MAP_FAILED)
            return NULL;
        banks->mapped = made;
        banks->area = banks->mapped + (HUGE_BYTES - (uintptr_t)made % HUGE_BYTES) % HUGE_BYTES;
    }
    Entry *range = range_of(banks, number);
    if (bank->entries == range && bytes < bank_bytes(bank)) {
        madvise((char *)range + bytes, bank_bytes(bank) - bytes, MADV_DONTNEED);
    } else if (bank->entries != range && bank->entries != NOTHING) {
        memcpy(range, bank->entries, bank_bytes(bank)); /* the heap holds less than the area */
        free(bank->entries);
    }
    return range;
}

/* Have this many bytes, as bytes_for has them, of which the first ones keep what they hold. */
static int resize(Banks *banks, uint32_t number, size_t bytes)
{
    Bank *bank = &banks->all[number];
    Entry *made;
    if (bytes <= HEAP_BYTES)
        made = resize_in_heap(bank, range_of(banks, number), bytes);
    else
        made = resize_in_area(banks, number, bytes);
    if (made == NULL)
        return -1;
    bank->entries = made;
    bank->room = (uint32_t)(bytes / sizeof(Entry));
    return 0;
}

static void clear(Bank *bank, uint32_t row, uint32_t end)
{
    if (row < end)
        memset(bank->entries + row, 0xff, (end - row) * sizeof(Entry));
}

/* --- one entry -------------------------------------------------------------------------------------------------- */

uint32_t bank_leap(const Bank *bank, uint64_t hash, uint32_t row)
{
    const Entry *entries = bank->entries;
    uint32_t high, step = LINES_NEAR * LINE_ROWS;
    /* All rows from the home to `row` are before; from there to the answer they are as well, and behind it none is. */
    for (;; step *= 2) {
        high = row + step < bank->room ? row + step : bank->room - 1;
        if (!is_before(entries + high, hash))
            break;
        row = high + 1;
    }
    while (row < high) {
        uint32_t middle = row + (high - row) / 2;
        if (is_before(entries + middle, hash))
            row = middle + 1;
        else
            high = middle;
    }
    return row;
}

int bank_open(Banks *banks, uint32_t number, uint32_t row)
{
    Bank *bank = &banks->all[number];
    Entry *entry = bank->entries + row, moved = *entry;
    while (moved.key != GAP) { /* mostly a few: a call of memmove takes longer */
        Entry next = *++entry;
        *entry = moved;
        moved = next;
    }
    uint32_t room = bank->room, gap = (uint32_t)(entry - bank->entries);
    if (gap + 1 < room)
        return 0;
    /* The last one has to stay a gap. */
    if (resize(banks, number, bytes_for((uint64_t)room + TAIL_ROWS)) < 0) {
        memmove(bank->entries + row, bank->entries + row + 1, (gap - row) * sizeof(Entry));
        clear(bank, gap, room);
        return -1;
    }
    clear(bank, room, bank->room);
    return 0;
}

void bank_close(Bank *bank, uint32_t row)
{
    uint32_t next = row + 1;
    while (bank->entries[next].key != GAP && home_of_entry(bank->homes, &bank->entries[next]) < next)
        next++;
    memmove(bank->entries + row, bank->entries + row + 1, (next - row - 1) * sizeof(Entry));
    clear(bank, next - 1, next);
}

/* --- all of them ------------------------------------------------------------------------------------------------ */

/* How many homes so many entries of a bank should have. The sizes that banks go through are a step apart, and those of the
 * next bank begin a part of a step further on: so they do not all grow at the same time, and all of them together are as full
 * as the mean of them always. In 256ths of a row. */
static uint64_t homes_for(uint32_t number, uint64_t count)
{
    uint64_t size = LEAST * 256 + LEAST * GROWTH * number / BANKS, least = (count + count / 64 + 1) * 256 * 256 / FULL;
    while (size < least)
        size += size * GROWTH / 256;
    uint64_t ideal = (size / 256 + TAIL_ROWS) * sizeof(Entry);
    uint64_t unit = ideal <= HEAP_BYTES ? UNIT_BYTES : PAGE_BYTES;
    return (ideal + unit - 1) / unit * unit / sizeof(Entry) - TAIL_ROWS;
}

int bank_is_sparse(const Banks *banks, uint32_t number)
{
    const Bank *bank = &banks->all[number];
    return (uint64_t)bank->count * 256 < (uint64_t)bank->homes * SPARSE && homes_for(number, bank->count) < bank->homes;
}

/* How many rows these entries take, with that many homes. */
static uint64_t rows_of(const Entry *entries, uint32_t count, uint32_t homes)
{
    uint64_t next = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t home = home_of_entry(homes, &entries[i]);
        next = (next > home ? next : home) + 1;
    }
    return next > homes ? next : homes;
}

int bank_lay(Banks *banks, uint32_t number, const Entry *entries, uint32_t count)
{
    Bank *bank = &banks->all[number];
    uint64_t homes = homes_for(number, count);
    if (homes > UINT32_MAX / 2)
        return -1;
    /* Where there are addresses for whatever it comes to, nobody needs to know before what it comes to. */
    uint64_t rows = homes + TAIL_ROWS, most = homes + count + 1;
    if (bytes_for(rows) <= HEAP_BYTES || bytes_for(most + TAIL_ROWS) > banks->reserve_bytes) {
        most = rows_of(entries, count, (uint32_t)homes) + 1;
        rows = most > rows ? most : rows;
    }
    if (resize(banks, number, bytes_for(rows)) < 0)
        return -1;
    if (bank->entries == range_of(banks, number))
        fit_pages(bank, bank->entries, bank_bytes(bank));
    bank->homes = (uint32_t)homes;
    bank->limit = (uint32_t)(homes * FULL / 256);
    bank->count = count;
    clear(bank, 0, bank->room);
    uint32_t next = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t home = home_of_entry(homes, &entries[i]);
        next = next > home ? next : home;
        bank->entries[next++] = entries[i];
        if (next == bank->room) {
            resize(banks, number, bytes_for((uint64_t)next + TAIL_ROWS)); /* addresses that it has already */
            clear(bank, next, bank->room);
        }
    }
    return 0;
}

/* --- when blocks end -------------------------------------------------------------------------------------------- */

static uint32_t ending_row(const Endings *endings, uint64_t id)
{
    uint32_t row = (uint32_t)(id >> 32) & (endings->room - 1);
    while (endings->rows[row].expires != 0 && endings->rows[row].id != id)
        row = (row + 1) & (endings->room - 1);
    return row;
}

uint32_t endings_get(const Endings *endings, uint64_t id)
{
    return endings->count == 0 ? 0 : endings->rows[ending_row(endings, id)].expires;
}

static int endings_grow(Endings *endings)
{
    Endings larger = {NULL, endings->room == 0 ? ENDINGS_MIN : 2 * endings->room, endings->count};
    larger.rows = calloc(larger.room, sizeof(Ending));
    if (larger.rows == NULL)
        return -1;
    for (uint32_t i = 0; i < endings->room; i++)
        if (endings->rows[i].expires != 0)
            larger.rows[ending_row(&larger, endings->rows[i].id)] = endings->rows[i];
    free(endings->rows);
    *endings = larger;
    return 0;
}

int endings_put(Endings *endings, uint64_t id, uint32_t expires)
{
    if (4 * ((uint64_t)endings->count + 1) > 3 * (uint64_t)endings->room && endings_grow(endings) < 0)
        return -1;
    Ending *row = endings->rows + ending_row(endings, id);
    endings->count += row->expires == 0;
    *row = (Ending){id, expires};
    return 0;
}

void endings_take(Endings *endings, uint64_t id)
{
    if (endings->count == 0)
        return;
    uint32_t mask = endings->room - 1, hole = ending_row(endings, id);
    if (endings->rows[hole].expires == 0)
        return;
    endings->count--;
    /* What follows moves up where its search would pass the hole. */
    for (uint32_t next = (hole + 1) & mask; endings->rows[next].expires != 0; next = (next + 1) & mask) {
        uint32_t wanted = (uint32_t)(endings->rows[next].id >> 32) & mask;
        if (((next - wanted) & mask) >= ((next - hole) & mask)) {
            endings->rows[hole] = endings->rows[next];
            hole = next;
        }
    }
    endings->rows[hole] = (Ending){0, 0};
}
