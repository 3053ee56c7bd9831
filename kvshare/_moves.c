#define _GNU_SOURCE
#include "_moves.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

#define IOVECS_MAX 1024 /* the kernel's limit for one sendmsg or recvmsg */
#define PIECE_BYTES (128 << 10) /* copied or received, then hashed: small enough to be in the second-level cache still */

static inline void *pointer(uint64_t address)
{
    return (void *)(uintptr_t)address;
}

/* --- hashing ---------------------------------------------------------------------------------------------------- */

void hasher_begin(Hasher *hasher, const uint64_t *seeds, uint64_t *digests, size_t count, size_t pages)
{
    hasher->seeds = seeds;
    hasher->digests = digests;
    hasher->count = count;
    hasher->pages = pages;
    hasher->range = 0;
    if (count > 0)
        xxh3_begin(&hasher->state, seeds[0]);
}

static void hasher_feed(Hasher *hasher, uint64_t address, uint64_t length)
{
    if (hasher->range < hasher->count * hasher->pages)
        xxh3_update(&hasher->state, pointer(address), length);
}

static void hasher_end_range(Hasher *hasher)
{
    hasher->range++;
    if (hasher->range % hasher->pages != 0 || hasher->range > hasher->count * hasher->pages)
        return;
    size_t block = hasher->range / hasher->pages;
    hasher->digests[block - 1] = xxh3_finish(&hasher->state);
    if (block < hasher->count)
        xxh3_begin(&hasher->state, hasher->seeds[block]);
}

void copy_all(const uint64_t *targets, const uint64_t *sources, const uint64_t *lengths, size_t count, Hasher *hasher)
{
    for (size_t i = 0; i < count; i++) {
        uint64_t piece_max = hasher != NULL ? PIECE_BYTES : UINT64_MAX;
        for (uint64_t done = 0; done < lengths[i];) {
            uint64_t piece = lengths[i] - done < piece_max ? lengths[i] - done : piece_max;
            if (sources != NULL)
                memcpy(pointer(targets[i] + done), pointer(sources[i] + done), piece);
            if (hasher != NULL)
                hasher_feed(hasher, targets[i] + done, piece); /* the target: what landed is what counts */
            done += piece;
        }
        if (hasher != NULL)
            hasher_end_range(hasher);
    }
}

/* --- sockets ---------------------------------------------------------------------------------------------------- */

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

void stream_begin(Stream *stream)
{
    stream->range = 0;
    stream->offset = 0;
    stream->total = 0;
    stream->deadline = now() + stream->seconds;
}

static size_t fill(const Stream *stream, struct iovec *vectors)
{
    size_t filled = 0;
    uint64_t offset = stream->offset, room = stream->hasher != NULL ? PIECE_BYTES : UINT64_MAX;
    for (size_t i = stream->range; i < stream->count && filled < IOVECS_MAX && room > 0; i++) {
        uint64_t left = stream->lengths[i] - offset;
        if (left > 0) {
            vectors[filled].iov_base = pointer(stream->addresses[i] + offset);
            vectors[filled].iov_len = left < room ? left : room;
            room -= vectors[filled].iov_len;
            filled++;
        }
        offset = 0;
    }
    return filled;
}

/* Account for `moved` bytes; pass over ranges that are done or empty. */
static void advance(Stream *stream, uint64_t moved)
{
    stream->total += moved;
    while (stream->range < stream->count) {
        uint64_t left = stream->lengths[stream->range] - stream->offset;
        uint64_t step = moved < left ? moved : left;
        if (stream->hasher != NULL && step > 0)
            hasher_feed(stream->hasher, stream->addresses[stream->range] + stream->offset, step);
        stream->offset += step;
        moved -= step;
        if (step < left)
            return;
        if (stream->hasher != NULL)
            hasher_end_range(stream->hasher);
        stream->range++;
        stream->offset = 0;
    }
}

static Outcome wait_ready(int fd, short events, double deadline)
{
    double left = deadline - now();
    if (left <= 0)
        return TIMED_OUT;
    struct pollfd entry = {.fd = fd, .events = events};
    int ready = poll(&entry, 1, left > 2e6 ? 2000000000 : (int)(left * 1e3) + 1);
    if (ready > 0)
        return MOVED; /* errors and hang-ups are told by the next sendmsg or recvmsg */
    if (ready == 0)
        return TIMED_OUT;
    return errno == EINTR ? SIGNALLED : FAILED;
}

Outcome stream_run(Stream *stream)
{
    struct iovec vectors[IOVECS_MAX];
    for (;;) {
        size_t filled = fill(stream, vectors);
        if (filled == 0) {
            advance(stream, 0);
            return MOVED;
        }
        struct msghdr message = {.msg_iov = vectors, .msg_iovlen = filled};
        /* MSG_DONTWAIT: the socket may be a blocking one; the time limit is ours. */
        ssize_t moved = stream->sending ? sendmsg(stream->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT)
                                        : recvmsg(stream->fd, &message, MSG_DONTWAIT);
        if (moved > 0) {
            advance(stream, (uint64_t)moved);
            stream->deadline = now() + stream->seconds;
            continue;
        }
        if (moved == 0 && !stream->sending)
            return CLOSED;
        if (moved < 0 && errno == EINTR)
            return SIGNALLED;
        if (moved < 0 && errno != EAGAIN && errno != EWOULDBLOCK)
            return FAILED;
        Outcome outcome = wait_ready(stream->fd, stream->sending ? POLLOUT : POLLIN, stream->deadline);
        if (outcome != MOVED)
            return outcome;
    }
}
