#define _GNU_SOURCE
#include "_moves.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

#define IOVECS_MAX 1024 /* the kernel's limit for one system call */
#define CALL_LIMIT 250000 /* microseconds */
#define PIECE_BYTES (256 << 10) /* received, then hashed: small enough to be in the second-level cache still */

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

static int hasher_wants(const Hasher *hasher)
{
    return hasher != NULL && hasher->range < hasher->count * hasher->pages;
}

static void hasher_end_range(Hasher *hasher)
{
    hasher->range++;
    if (hasher->range % hasher->pages != 0 || hasher->range > hasher->count * hasher->pages)
        return;
    size_t block = hasher->range / hasher->pages;
    hasher->digests[block - 1] = hasher->state.length >= XXH3_LENGTH_MIN ? xxh3_finish(&hasher->state) : 0;
    if (block < hasher->count)
        xxh3_begin(&hasher->state, hasher->seeds[block]);
}

void copy_all(const uint64_t *targets, const uint64_t *sources, const uint64_t *lengths, size_t count, Hasher *hasher)
{
    uint64_t total = 0;
    for (size_t i = 0; i < count; i++)
        total += lengths[i];
    int stream = total >= STREAM_BYTES_MIN;
    for (size_t i = 0; i < count; i++) {
        if (!hasher_wants(hasher))
            memcpy(pointer(targets[i]), pointer(sources[i]), lengths[i]);
        else if (sources == NULL)
            xxh3_update(&hasher->state, pointer(targets[i]), lengths[i]);
        else
            xxh3_copy(&hasher->state, pointer(targets[i]), pointer(sources[i]), lengths[i], stream);
        if (hasher != NULL)
            hasher_end_range(hasher);
    }
    if (stream)
        xxh3_fence();
}

void copy_block(const uint64_t *targets, const uint8_t *source, const uint64_t *page_bytes, size_t pages, uint64_t seed,
                uint64_t *digest, int stream)
{
    Xxh3 state;
    xxh3_begin(&state, seed);
    for (size_t page = 0; page < pages; page++) {
        xxh3_copy(&state, pointer(targets[page]), source, page_bytes[page], stream);
        source += page_bytes[page];
    }
    *digest = state.length >= XXH3_LENGTH_MIN ? xxh3_finish(&state) : 0;
}

/* --- sockets ---------------------------------------------------------------------------------------------------- */

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

/* A blocking call that waits for all its bytes in the kernel wakes up far less often than one that is polled for. So that it
 * ends when a peer falls silent, it gets a time limit, a short one: ours is about progress, the kernel's about the call. */
static struct timeval limit_calls(const Stream *stream, struct timeval limit)
{
    int option = stream->sending ? SO_SNDTIMEO : SO_RCVTIMEO;
    struct timeval before = {0};
    socklen_t size = sizeof before;
    getsockopt(stream->fd, SOL_SOCKET, option, &before, &size);
    setsockopt(stream->fd, SOL_SOCKET, option, &limit, sizeof limit);
    return before;
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
        if (step > 0 && hasher_wants(stream->hasher))
            xxh3_update(&stream->hasher->state, pointer(stream->addresses[stream->range] + stream->offset), step);
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

static Outcome after_signal(const Stream *stream)
{
    return stream->interrupted() ? INTERRUPTED : MOVED;
}

static Outcome wait_ready(const Stream *stream)
{
    double left = stream->deadline - now();
    if (left <= 0)
        return TIMED_OUT;
    struct pollfd entry = {.fd = stream->fd, .events = stream->sending ? POLLOUT : POLLIN};
    int ready = poll(&entry, 1, left > 2e6 ? 2000000000 : (int)(left * 1e3) + 1);
    if (ready > 0)
        return MOVED; /* errors and hang-ups are told by the next sendmsg or recvmsg */
    if (ready == 0)
        return TIMED_OUT;
    return errno == EINTR ? after_signal(stream) : FAILED;
}

static Outcome run_limited(Stream *stream)
{
    struct iovec vectors[IOVECS_MAX];
    for (;;) {
        size_t filled = fill(stream, vectors);
        if (filled == 0) {
            advance(stream, 0);
            return MOVED;
        }
        struct msghdr message = {.msg_iov = vectors, .msg_iovlen = filled};
        ssize_t moved = stream->sending ? sendmsg(stream->fd, &message, MSG_NOSIGNAL | (stream->more ? MSG_MORE : 0))
                                        : recvmsg(stream->fd, &message, MSG_WAITALL);
        if (moved > 0) {
            advance(stream, (uint64_t)moved);
            stream->deadline = now() + stream->seconds;
            continue;
        }
        if (moved == 0 && !stream->sending)
            return CLOSED;
        if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)
            return FAILED;
        Outcome outcome = errno == EINTR ? after_signal(stream) : wait_ready(stream);
        if (outcome != MOVED)
            return outcome;
    }
}

Outcome stream_run(Stream *stream)
{
    stream->deadline = now() + stream->seconds;
    long microseconds = (long)(stream->seconds * 1e6 / 4);
    struct timeval limit = {.tv_usec = microseconds < 1000 ? 1000 : microseconds > CALL_LIMIT ? CALL_LIMIT : microseconds};
    struct timeval before = limit_calls(stream, limit);
    Outcome outcome = run_limited(stream);
    int error = errno;
    limit_calls(stream, before);
    errno = error;
    return outcome;
}

/* --- other processes -------------------------------------------------------------------------------------------- */

/* One side of a call; `filled` vectors. */
typedef struct {
    struct iovec vectors[IOVECS_MAX];
    size_t filled;
} Vectors;

/* Add a range, as part of the one before it where that goes on here: each vector costs the kernel about as much as a page. */
static void add_range(Vectors *side, uint64_t address, uint64_t length)
{
    struct iovec *vectors = side->vectors;
    size_t filled = side->filled;
    if (filled > 0 && (uint64_t)(uintptr_t)vectors[filled - 1].iov_base + vectors[filled - 1].iov_len == address) {
        vectors[filled - 1].iov_len += length;
        return;
    }
    vectors[filled].iov_base = pointer(address);
    vectors[filled].iov_len = length;
    side->filled = filled + 1;
}

int read_process(pid_t pid, const uint64_t *targets, const uint64_t *sources, const uint64_t *lengths, size_t count)
{
    Vectors ours, theirs;
    size_t range = 0;
    uint64_t offset = 0; /* bytes of that range that are done */
    for (;;) {
        ours.filled = theirs.filled = 0;
        uint64_t skipped = offset;
        for (size_t i = range; i < count && ours.filled < IOVECS_MAX && theirs.filled < IOVECS_MAX; i++) {
            if (lengths[i] > skipped) {
                add_range(&ours, targets[i] + skipped, lengths[i] - skipped);
                add_range(&theirs, sources[i] + skipped, lengths[i] - skipped);
            }
            skipped = 0;
        }
        if (ours.filled == 0)
            return 0;
        ssize_t moved = process_vm_readv(pid, ours.vectors, ours.filled, theirs.vectors, theirs.filled, 0);
        if (moved <= 0)
            return moved < 0 ? errno : EFAULT;
        /* The kernel stops early at memory that is not there, and says so when it is asked to begin with it. */
        offset += (uint64_t)moved;
        while (range < count && offset >= lengths[range])
            offset -= lengths[range++];
    }
}
