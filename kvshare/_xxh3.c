#include "_xxh3.h"

#include <string.h>

#define PRIME32_1 0x9E3779B1U
#define PRIME32_2 0x85EBCA77U
#define PRIME32_3 0xC2B2AE3DU
#define PRIME64_1 0x9E3779B185EBCA87ULL
#define PRIME64_2 0xC2B2AE3D27D4EB4FULL
#define PRIME64_3 0x165667B19E3779F9ULL
#define PRIME64_4 0x85EBCA77C2B2AE63ULL
#define PRIME64_5 0x27D4EB2F165667C5ULL
#define PREFETCH_BYTES 1024
#define STREAM_ALIGNMENT 16
#define STRIPES ((XXH3_SECRET - XXH3_STRIPE) / 8) /* between two scramblings: the secret moves 8 bytes a stripe */

static const uint8_t SECRET[XXH3_SECRET] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d, 0xe9,
    0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78,
    0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6,
    0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f,
    0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31,
    0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff,
    0xfa, 0x13, 0x63, 0xeb, 0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f,
    0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

static inline uint64_t read64(const uint8_t *data)
{
    uint64_t value;
    memcpy(&value, data, 8);
    return value;
}

static inline void sum_stripe(uint64_t *sums, const uint8_t *data, const uint8_t *secret)
{
    for (int i = 0; i < 8; i++) {
        uint64_t value = read64(data + 8 * i), keyed = value ^ read64(secret + 8 * i);
        sums[i ^ 1] += value;
        sums[i] += (keyed & 0xffffffffU) * (keyed >> 32);
    }
}

/* How stripes are copied while they are summed. A byte is loaded once: what is summed is what is stored. */
enum { SUM_ONLY, STORE, STREAM }; /* STREAM: past the cache, to an aligned target, for copies larger than it */

/* Sum `count` stripes and copy them; `stripe` counts those since the last scrambling, which comes when the secret is used up.
 * Returns the new count. This is where the time goes, so it is made once per instruction set and mode: WORDS is a vector of
 * 64-bit words, MULTIPLY multiplies the low halves of two of them, SWAP exchanges neighbours, STREAM_STORE stores past the
 * cache. A whole kilobyte is unrolled: a loop of 16 that ends by a mispredicted branch takes nearly twice as long. */
typedef unsigned SumStripes(uint64_t *sums, const uint8_t *secret, unsigned stripe, const uint8_t *data, size_t count,
                            uint8_t *target, int mode);

#define INLINE static inline __attribute__((always_inline))

#define DEFINE_SUM_STRIPES(NAME, TARGET, WORDS, MULTIPLY, SWAP, STREAM_STORE)                                                \
    TARGET INLINE void NAME##_one(WORDS *totals, const uint8_t *data, const uint8_t *secret, uint8_t *target, int mode)      \
    {                                                                                                                        \
        for (size_t part = 0; part < XXH3_STRIPE / sizeof(WORDS); part++) {                                                  \
            WORDS value, key;                                                                                                \
            memcpy(&value, data + part * sizeof value, sizeof value);                                                        \
            memcpy(&key, secret + part * sizeof key, sizeof key);                                                            \
            __asm__("" : IN_REGISTER(value)); /* or it is loaded twice */                                                    \
            if (mode == STREAM)                                                                                              \
                STREAM_STORE(target + part * sizeof value, value);                                                           \
            else if (mode == STORE)                                                                                          \
                memcpy(target + part * sizeof value, &value, sizeof value);                                                  \
            key ^= value;                                                                                                    \
            totals[part] += SWAP(value) + (WORDS)MULTIPLY(key, key >> 32);                                                   \
        }                                                                                                                    \
    }                                                                                                                        \
    TARGET INLINE void NAME##_scramble(WORDS *totals, const uint8_t *secret)                                                 \
    {                                                                                                                        \
        const WORDS prime = PRIME32_1 - (WORDS){0};                                                                          \
        for (size_t part = 0; part < XXH3_STRIPE / sizeof(WORDS); part++) {                                                  \
            WORDS key;                                                                                                       \
            memcpy(&key, secret + XXH3_SECRET - XXH3_STRIPE + part * sizeof key, sizeof key);                                \
            key ^= totals[part] ^ (totals[part] >> 47);                                                                      \
            totals[part] = (WORDS)MULTIPLY(key, prime) + ((WORDS)MULTIPLY(key >> 32, prime) << 32);                          \
        }                                                                                                                    \
    }                                                                                                                        \
    TARGET INLINE unsigned NAME##_mode(uint64_t *sums, const uint8_t *secret, unsigned stripe, const uint8_t *data,          \
                                       size_t count, uint8_t *target, int mode)                                              \
    {                                                                                                                        \
        WORDS totals[XXH3_STRIPE / sizeof(WORDS)];                                                                           \
        memcpy(totals, sums, sizeof totals);                                                                                 \
        while (count > 0) {                                                                                                  \
            size_t run = 1;                                                                                                  \
            if (stripe == 0 && count >= STRIPES) {                                                                           \
                run = STRIPES;                                                                                               \
                _Pragma("GCC unroll 16") for (size_t i = 0; i < STRIPES; i++)                                                \
                {                                                                                                            \
                    __builtin_prefetch(data + i * XXH3_STRIPE + PREFETCH_BYTES);                                             \
                    NAME##_one(totals, data + i * XXH3_STRIPE, secret + 8 * i, target + i * XXH3_STRIPE, mode);              \
                }                                                                                                            \
            } else {                                                                                                         \
                NAME##_one(totals, data, secret + 8 * stripe, target, mode);                                                 \
            }                                                                                                                \
            data += run * XXH3_STRIPE;                                                                                       \
            target += mode == SUM_ONLY ? 0 : run * XXH3_STRIPE;                                                              \
            count -= run;                                                                                                    \
            stripe += (unsigned)run;                                                                                         \
            if (stripe == STRIPES) {                                                                                         \
                NAME##_scramble(totals, secret);                                                                             \
                stripe = 0;                                                                                                  \
            }                                                                                                                \
        }                                                                                                                    \
        memcpy(sums, totals, sizeof totals);                                                                                 \
        return stripe;                                                                                                       \
    }                                                                                                                        \
    TARGET static unsigned NAME(uint64_t *sums, const uint8_t *secret, unsigned stripe, const uint8_t *data, size_t count,   \
                                uint8_t *target, int mode)                                                                   \
    {                                                                                                                        \
        if (mode == STREAM)                                                                                                  \
            return NAME##_mode(sums, secret, stripe, data, count, target, STREAM);                                           \
        if (mode == STORE)                                                                                                   \
            return NAME##_mode(sums, secret, stripe, data, count, target, STORE);                                            \
        return NAME##_mode(sums, secret, stripe, data, count, target, SUM_ONLY);                                             \
    }

#if defined(__x86_64__)
#include <immintrin.h>
#define IN_REGISTER(value) "+v"(value)
typedef uint64_t Words2 __attribute__((vector_size(16)));
typedef uint64_t Words4 __attribute__((vector_size(32)));
typedef uint64_t Words8 __attribute__((vector_size(64)));
#define MULTIPLY2(a, b) _mm_mul_epu32((__m128i)(a), (__m128i)(b))
#define MULTIPLY4(a, b) _mm256_mul_epu32((__m256i)(a), (__m256i)(b))
#define MULTIPLY8(a, b) _mm512_mul_epu32((__m512i)(a), (__m512i)(b))
#define SWAP2(value) ((Words2)_mm_shuffle_epi32((__m128i)(value), 0x4e))
#define SWAP4(value) ((Words4)_mm256_shuffle_epi32((__m256i)(value), 0x4e))
#define SWAP8(value) ((Words8)_mm512_shuffle_epi32((__m512i)(value), 0x4e))
/* In 16 bytes, as arrays are aligned by malloc: the processor joins them to lines again. */
#define STREAM2(target, value) _mm_stream_si128((__m128i *)(target), (__m128i)(value))
#define STREAM4(target, value)                                                          \
    do {                                                                                \
        STREAM2(target, _mm256_castsi256_si128((__m256i)(value)));                      \
        STREAM2((target) + 16, _mm256_extracti128_si256((__m256i)(value), 1));          \
    } while (0)
#define STREAM8(target, value)                                                          \
    do {                                                                                \
        STREAM2(target, _mm512_castsi512_si128((__m512i)(value)));                      \
        STREAM2((target) + 16, _mm512_extracti32x4_epi32((__m512i)(value), 1));         \
        STREAM2((target) + 32, _mm512_extracti32x4_epi32((__m512i)(value), 2));         \
        STREAM2((target) + 48, _mm512_extracti32x4_epi32((__m512i)(value), 3));         \
    } while (0)
DEFINE_SUM_STRIPES(sum_stripes_sse2, , Words2, MULTIPLY2, SWAP2, STREAM2)
DEFINE_SUM_STRIPES(sum_stripes_avx2, __attribute__((target("avx2"))), Words4, MULTIPLY4, SWAP4, STREAM4)
DEFINE_SUM_STRIPES(sum_stripes_avx512, __attribute__((target("avx512f"))), Words8, MULTIPLY8, SWAP8, STREAM8)

static SumStripes *choose(void)
{
    if (__builtin_cpu_supports("avx512f"))
        return sum_stripes_avx512;
    return __builtin_cpu_supports("avx2") ? sum_stripes_avx2 : sum_stripes_sse2;
}
#elif defined(__aarch64__)
#include <arm_neon.h>
#define IN_REGISTER(value) "+w"(value)
#define MULTIPLY2(a, b) vmull_u32(vmovn_u64(a), vmovn_u64(b))
#define SWAP2(value) vextq_u64(value, value, 1)
#define STORE2(target, value) memcpy(target, &(value), sizeof(value))
DEFINE_SUM_STRIPES(sum_stripes_neon, , uint64x2_t, MULTIPLY2, SWAP2, STORE2)

static SumStripes *choose(void)
{
    return sum_stripes_neon;
}
#else
#error "kvshare is made for x86-64 and arm64"
#endif

void xxh3_begin(Xxh3 *state, uint64_t seed)
{
    static const uint64_t FIRST[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    memcpy(state->sums, FIRST, sizeof FIRST);
    for (int i = 0; i < XXH3_SECRET; i += 16) {
        uint64_t low = read64(SECRET + i) + seed, high = read64(SECRET + i + 8) - seed;
        memcpy(state->secret + i, &low, 8);
        memcpy(state->secret + i + 8, &high, 8);
    }
    state->pending = 0;
    state->stripe = 0;
    state->length = 0;
}

/* Sum whole stripes of the input, and copy them where there is a target. */
static void take_stripes(Xxh3 *state, const uint8_t *data, size_t count, uint8_t *target, int stream)
{
    int mode = target == NULL ? SUM_ONLY : stream && (uintptr_t)target % STREAM_ALIGNMENT == 0 ? STREAM : STORE;
    state->stripe = choose()(state->sums, state->secret, state->stripe, data, count, target, mode);
}

void xxh3_copy(Xxh3 *state, void *output, const void *input, size_t length, int stream)
{
    const uint8_t *data = input;
    uint8_t *target = output, *pending = state->tail + XXH3_STRIPE;
    state->length += length;
    if (state->pending > 0 || length <= XXH3_STRIPE) {
        size_t taken = XXH3_STRIPE - state->pending < length ? XXH3_STRIPE - state->pending : length;
        memcpy(pending + state->pending, data, taken);
        if (target != NULL) {
            memcpy(target, pending + state->pending, taken);
            target += taken;
        }
        state->pending += taken;
        data += taken;
        length -= taken;
        if (length == 0)
            return; /* one byte or more stays pending: the last stripe is summed by finish */
        take_stripes(state, pending, 1, NULL, 0);
        memcpy(state->tail, pending, XXH3_STRIPE);
    }
    size_t count = (length - 1) / XXH3_STRIPE;
    if (count > 0) {
        take_stripes(state, data, count, target, stream);
        data += count * XXH3_STRIPE;
        target += target == NULL ? 0 : count * XXH3_STRIPE;
        length -= count * XXH3_STRIPE;
        /* From where it was copied to, if it was: the input may have changed since. */
        memcpy(state->tail, target != NULL ? target - XXH3_STRIPE : data - XXH3_STRIPE, XXH3_STRIPE);
    }
    memcpy(pending, data, length);
    state->pending = length;
    if (target != NULL)
        memcpy(target, pending, length);
}

void xxh3_update(Xxh3 *state, const void *input, size_t length)
{
    xxh3_copy(state, NULL, input, length, 0);
}

void xxh3_fence(void)
{
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

static inline uint64_t fold(uint64_t a, uint64_t b)
{
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

uint64_t xxh3_finish(Xxh3 *state)
{
    sum_stripe(state->sums, state->tail + state->pending, state->secret + XXH3_SECRET - XXH3_STRIPE - 7);
    uint64_t hash = state->length * PRIME64_1;
    for (int i = 0; i < 4; i++) {
        const uint8_t *secret = state->secret + 11 + 16 * i;
        hash += fold(state->sums[2 * i] ^ read64(secret), state->sums[2 * i + 1] ^ read64(secret + 8));
    }
    hash ^= hash >> 37;
    hash *= 0x165667919E3779F9ULL;
    return hash ^ (hash >> 32);
}
