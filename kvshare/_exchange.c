#include "_exchange.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static const char MAGIC[4] = {'K', 'V', 'S', 'V'};
#define VERDICT_HEAD 8 /* magic, number of blocks; then a byte for each */

/* All parts of an answer are whole lines: the kernel's copies of what follows would take three times as long if it began at an
 * odd place. */
static size_t padded(size_t bytes)
{
    return (bytes + 63) / 64 * 64;
}

static size_t verdict_bytes(size_t blocks)
{
    return padded(VERDICT_HEAD + blocks);
}

static size_t trailer_bytes(size_t blocks)
{
    return padded(16 * blocks);
}

enum { RECEIVE, SEND, SEND_MORE };

static Outcome move_all(int fd, int sending, double seconds, Interrupted *interrupted, const uint64_t *addresses,
                        const uint64_t *lengths, size_t count, Hasher *hasher)
{
    Stream stream = {.fd = fd, .sending = sending, .seconds = seconds, .interrupted = interrupted, .hasher = hasher};
    stream.addresses = addresses;
    stream.lengths = lengths;
    stream.count = count;
    stream.more = sending == SEND_MORE;
    return stream_run(&stream);
}

static Outcome out_of_memory(void)
{
    errno = ENOMEM;
    return FAILED;
}

/* --- the owner ---------------------------------------------------------------------------------------------------- */

/* Memory of one answer: everything is allocated before the first byte is sent. */
typedef struct {
    uint8_t *verdict;
    int64_t *live; /* slots to be sent */
    uint64_t *trailer, *addresses, *lengths;
} Sending;

/* Send `before` and the bytes of `count` live slots; then make their trailer. */
static Outcome send_portion(const Answer *answer, const Sending *sending, const int64_t *live, size_t count, const void *before,
                            size_t before_bytes)
{
    sending->addresses[0] = (uint64_t)(uintptr_t)before;
    sending->lengths[0] = before_bytes;
    for (size_t i = 0; i < count; i++) {
        sending->addresses[i + 1] = (uint64_t)(uintptr_t)(answer->data + (uint64_t)live[i] * answer->slot_bytes);
        sending->lengths[i + 1] = answer->length;
    }
    Outcome outcome = move_all(answer->fd, SEND_MORE, answer->seconds, answer->interrupted, sending->addresses, sending->lengths,
                               count + 1, NULL);
    if (outcome == MOVED)
        load_headers(answer->table, live, count, sending->trailer, sending->trailer + count);
    return outcome;
}

static Outcome send_with(Answer *answer, const Sending *sending)
{
    uint32_t count = (uint32_t)answer->count;
    memcpy(sending->verdict, MAGIC, sizeof MAGIC);
    memcpy(sending->verdict + sizeof MAGIC, &count, sizeof count);
    size_t live = 0;
    for (size_t i = 0; i < answer->count; i++) {
        int there = answer->length <= answer->slot_bytes && slot_holds(answer->table, answer->available, answer->slots[i],
                                                                       answer->expected[i], answer->length);
        sending->verdict[VERDICT_HEAD + i] = there ? STATUS_OK : STATUS_STALE;
        if (there)
            sending->live[live++] = answer->slots[i];
    }
    /* What comes before a portion goes with it in one system call: the verdict, or the trailer of the portion before. */
    const void *before = sending->verdict;
    size_t before_bytes = verdict_bytes(answer->count);
    for (size_t at = 0; at < live; at += answer->portion_blocks) {
        size_t blocks = live - at < answer->portion_blocks ? live - at : answer->portion_blocks;
        Outcome outcome = send_portion(answer, sending, sending->live + at, blocks, before, before_bytes);
        if (outcome != MOVED)
            return outcome;
        before = sending->trailer;
        before_bytes = trailer_bytes(blocks);
        answer->blocks_sent += blocks;
    }
    uint64_t address = (uint64_t)(uintptr_t)before, length = before_bytes;
    return move_all(answer->fd, SEND, answer->seconds, answer->interrupted, &address, &length, 1, NULL);
}

Outcome send_answer(Answer *answer)
{
    size_t portion = answer->portion_blocks < answer->count ? answer->portion_blocks : answer->count;
    Sending sending = {
        .verdict = calloc(1, verdict_bytes(answer->count)),
        .live = malloc((answer->count + 1) * sizeof(int64_t)),
        .trailer = calloc(1, trailer_bytes(portion) + 1),
        .addresses = malloc((portion + 1) * sizeof(uint64_t)),
        .lengths = malloc((portion + 1) * sizeof(uint64_t)),
    };
    answer->portion_blocks = portion;
    answer->blocks_sent = 0;
    int complete = sending.verdict && sending.live && sending.trailer && sending.addresses && sending.lengths;
    Outcome outcome = complete ? send_with(answer, &sending) : out_of_memory();
    int error = errno;
    free(sending.verdict);
    free(sending.live);
    free(sending.trailer);
    free(sending.addresses);
    free(sending.lengths);
    errno = error;
    return outcome;
}

/* --- the reader --------------------------------------------------------------------------------------------------- */

typedef struct {
    uint8_t *verdict;
    size_t *live; /* blocks that follow */
    uint64_t *addresses, *lengths;
    uint64_t *seeds, *digests, *trailer; /* of a portion */
} Receiving;

static Outcome receive_portion(Reception *reception, const Receiving *receiving, const size_t *live, size_t count)
{
    size_t ranges = 0;
    uint64_t length = 0;
    for (size_t page = 0; page < reception->pages; page++)
        length += reception->page_bytes[page];
    for (size_t i = 0; i < count; i++) {
        receiving->seeds[i] = reception->seeds[live[i]];
        for (size_t page = 0; page < reception->pages; page++) {
            receiving->addresses[ranges] = reception->targets[live[i] * reception->pages + page];
            receiving->lengths[ranges++] = reception->page_bytes[page];
        }
    }
    receiving->addresses[ranges] = (uint64_t)(uintptr_t)receiving->trailer;
    receiving->lengths[ranges++] = trailer_bytes(count);
    Hasher hasher;
    hasher_begin(&hasher, receiving->seeds, receiving->digests, count, reception->pages);
    Outcome outcome = move_all(reception->fd, RECEIVE, reception->seconds, reception->interrupted, receiving->addresses,
                               receiving->lengths, ranges, &hasher);
    for (size_t i = 0; outcome == MOVED && i < count; i++) {
        size_t block = live[i];
        reception->checksums[block] = receiving->trailer[count + i];
        reception->statuses[block] = judge(reception->expected[block], receiving->trailer[i], receiving->trailer[count + i],
                                           receiving->digests[i], length);
        reception->ok += reception->statuses[block] == STATUS_OK;
    }
    return outcome;
}

static Outcome receive_with(Reception *reception, const Receiving *receiving)
{
    uint64_t address = (uint64_t)(uintptr_t)receiving->verdict, length = verdict_bytes(reception->count);
    Outcome outcome = move_all(reception->fd, RECEIVE, reception->seconds, reception->interrupted, &address, &length, 1, NULL);
    if (outcome != MOVED)
        return outcome;
    uint32_t count = (uint32_t)reception->count;
    if (memcmp(receiving->verdict, MAGIC, sizeof MAGIC) != 0 ||
        memcmp(receiving->verdict + sizeof MAGIC, &count, sizeof count) != 0)
        return GARBLED;
    size_t live = 0;
    for (size_t i = 0; i < reception->count; i++) {
        uint8_t verdict = receiving->verdict[VERDICT_HEAD + i];
        if (verdict == STATUS_OK)
            receiving->live[live++] = i;
        else if (verdict == STATUS_STALE || verdict == STATUS_UNREACHABLE)
            reception->statuses[i] = verdict;
        else
            return GARBLED;
    }
    for (size_t at = 0; outcome == MOVED && at < live; at += reception->portion_blocks) {
        size_t blocks = live - at < reception->portion_blocks ? live - at : reception->portion_blocks;
        outcome = receive_portion(reception, receiving, receiving->live + at, blocks);
    }
    return outcome;
}

Outcome receive_answer(Reception *reception)
{
    size_t portion = reception->portion_blocks < reception->count ? reception->portion_blocks : reception->count;
    size_t ranges = portion * reception->pages + 1;
    Receiving receiving = {
        .verdict = malloc(verdict_bytes(reception->count)),
        .live = malloc((reception->count + 1) * sizeof(size_t)),
        .addresses = malloc(ranges * sizeof(uint64_t)),
        .lengths = malloc(ranges * sizeof(uint64_t)),
        .seeds = malloc((portion + 1) * sizeof(uint64_t)),
        .digests = malloc((portion + 1) * sizeof(uint64_t)),
        .trailer = malloc(trailer_bytes(portion) + 1),
    };
    reception->portion_blocks = portion;
    reception->ok = 0;
    int complete = receiving.verdict && receiving.live && receiving.addresses && receiving.lengths && receiving.seeds &&
                   receiving.digests && receiving.trailer;
    Outcome outcome = complete ? receive_with(reception, &receiving) : out_of_memory();
    int error = errno;
    free(receiving.verdict);
    free(receiving.live);
    free(receiving.addresses);
    free(receiving.lengths);
    free(receiving.seeds);
    free(receiving.digests);
    free(receiving.trailer);
    errno = error;
    return outcome;
}
