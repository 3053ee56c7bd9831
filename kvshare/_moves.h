/* Moving bytes between ranges of memory and sockets, hashing blocks on the way. No Python in here. */
#ifndef KVSHARE_MOVES_H
#define KVSHARE_MOVES_H

#include <sys/types.h>

#include "_xxh3.h"

typedef enum { MOVED, TIMED_OUT, CLOSED, FAILED, GARBLED, INTERRUPTED } Outcome;

/* Called when a signal came; true: give up (INTERRUPTED). */
typedef int Interrupted(void);

/* Blocks of `pages` successive ranges each: their checksums are made while their bytes are in the cache. */
typedef struct {
    const uint64_t *seeds;
    uint64_t *digests;
    size_t count; /* blocks; ranges behind the last one are not hashed */
    size_t pages;
    size_t range; /* the range under way */
    Xxh3 state;
} Hasher;

void hasher_begin(Hasher *hasher, const uint64_t *seeds, uint64_t *digests, size_t count, size_t pages);

/* Copy ranges; with sources NULL only hash. With hasher NULL only copy. */
void copy_all(const uint64_t *targets, const uint64_t *sources, const uint64_t *lengths, size_t count, Hasher *hasher);

#define STREAM_BYTES_MIN (1 << 20) /* a copy of more would not stay in the cache anyway: it goes past it */

/* Copy one block from where it lies in one piece to its pages; its digest, if it is long enough for one, else 0. */
void copy_block(const uint64_t *targets, const uint8_t *source, const uint64_t *page_bytes, size_t pages, uint64_t seed,
                uint64_t *digest, int stream);

/* A transfer through a socket: all of its ranges, in order. */
typedef struct {
    int fd;
    int sending;
    int more; /* more will be sent at once: nothing small goes out alone */
    const uint64_t *addresses;
    const uint64_t *lengths;
    size_t count;
    size_t range;    /* the range under way */
    uint64_t offset; /* bytes of it that are done */
    uint64_t total;
    double seconds; /* longest time without progress */
    double deadline;
    Interrupted *interrupted;
    Hasher *hasher; /* or NULL */
} Stream;

/* Move all ranges, from the first. */
Outcome stream_run(Stream *stream);

/* Copy ranges of another process's memory into ours. 0, or why not all were copied: an errno, EFAULT for memory that is not
 * mapped (there or here), ESRCH for a process that is gone, EPERM for one that may not be read. */
int read_process(pid_t pid, const uint64_t *targets, const uint64_t *sources, const uint64_t *lengths, size_t count);

#endif
