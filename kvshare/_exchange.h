/* The two ends of one answer of the tcp transport; kvshare/transport/tcp_protocol.py has the layout. No Python in here. */
#ifndef KVSHARE_EXCHANGE_H
#define KVSHARE_EXCHANGE_H

#include "_moves.h"
#include "_slots.h"

enum { VERDICT_OK = 0, VERDICT_STALE = 1, VERDICT_UNREACHABLE = 3, VERDICT_UNKNOWN = 255 };

typedef struct {
    int fd;
    double seconds; /* longest time without progress */
    Interrupted *interrupted;
    const Header *table;
    const uint8_t *data;
    uint64_t slot_bytes;
    uint64_t available;
    const int64_t *slots;
    const uint64_t *expected;
    size_t count;
    uint64_t length;
    size_t portion_blocks;
    uint64_t blocks_sent; /* result */
} Answer;

Outcome send_answer(Answer *answer);

typedef struct {
    int fd;
    double seconds;
    Interrupted *interrupted;
    const uint64_t *targets; /* pages of block 0, pages of block 1, ... */
    const uint64_t *page_bytes;
    size_t pages;
    const uint64_t *seeds;
    size_t count;
    size_t portion_blocks;
    /* Results, one per block: a verdict as soon as the block's outcome is known (OK: its bytes and the other three are here). */
    uint8_t *verdicts;
    uint64_t *generations, *checksums, *digests;
} Reception;

Outcome receive_answer(Reception *reception);

#endif
