/* The two ends of one answer of the tcp transport; kvshare/transport/tcp_protocol.py has the layout. No Python in here. */
#ifndef KVSHARE_EXCHANGE_H
#define KVSHARE_EXCHANGE_H

#include "_moves.h"
#include "_slots.h"

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
    const uint64_t *expected;
    const uint64_t *seeds;
    size_t count;
    size_t portion_blocks;
    uint8_t *statuses;   /* results, one per block, as soon as its outcome is known */
    uint64_t *checksums; /* those that the headers of blocks that arrived told */
    size_t ok;           /* result: how many are */
} Reception;

Outcome receive_answer(Reception *reception);

#endif
