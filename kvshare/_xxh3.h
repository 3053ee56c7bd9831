/* XXH3, 64 bits, seeded, streaming, for inputs longer than 240 bytes: the checksum of a block as its bytes arrive.
 *
 * Written from the public specification; equal to the xxhash package's xxh3_64 (tests/unit/test_native.py compares them).
 */
#ifndef KVSHARE_XXH3_H
#define KVSHARE_XXH3_H

#include <stddef.h>
#include <stdint.h>

#define XXH3_LENGTH_MIN 241 /* shorter inputs have formulas of their own, not made here */
#define XXH3_STRIPE 64
#define XXH3_SECRET 192

typedef struct {
    uint64_t sums[8] __attribute__((aligned(64)));
    uint8_t secret[XXH3_SECRET] __attribute__((aligned(64)));
    /* The last stripe summed, and behind it what has not been: at most one stripe, since the input's last one is special. */
    uint8_t tail[2 * XXH3_STRIPE];
    size_t pending;
    unsigned stripe; /* within the present kilobyte */
    uint64_t length;
} Xxh3;

void xxh3_begin(Xxh3 *state, uint64_t seed);
/* Update by what is copied on the way. `stream`: past the cache; before another thread may see it, call `xxh3_fence`. */
void xxh3_copy(Xxh3 *state, void *target, const void *data, size_t length, int stream);
void xxh3_fence(void);
void xxh3_update(Xxh3 *state, const void *data, size_t length);
uint64_t xxh3_finish(Xxh3 *state);

#endif
