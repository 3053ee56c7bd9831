#include "_fingerprints.h"

#include <stdint.h>
#include <string.h>

#define PRIME64_1 0x9E3779B185EBCA87ULL

/* The first 64 bytes of XXH3's secret. */
static const uint64_t SECRET[8] = {0xbe4ba423396cfeb8ULL, 0x1cad21f72c81017cULL, 0xdb979083e96dd4deULL, 0x1f67b3b7a4a44072ULL,
                                   0x78e5c0cc4ee679cbULL, 0x2172ffcc7dd05a82ULL, 0x8e2443f7744608b8ULL, 0x4c263a81e69035e0ULL};

/* What does not change from key to key. */
typedef struct {
    uint64_t of_prefix, keyed[4];
} Keyed;

static inline uint64_t read64(const uint8_t *data)
{
    uint64_t value;
    memcpy(&value, data, 8);
    return value;
}

static inline uint64_t fold(uint64_t a, uint64_t b)
{
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static inline uint64_t fold16(const uint8_t *data, uint64_t keyed_low, uint64_t keyed_high)
{
    return fold(read64(data) ^ keyed_low, read64(data + 8) ^ keyed_high);
}

static Keyed begin(const uint8_t *prefix, size_t key_bytes, uint64_t seed)
{
    Keyed keyed = {key_bytes * PRIME64_1, {SECRET[6] + seed, SECRET[7] - seed, SECRET[2] + seed, SECRET[3] - seed}};
    keyed.of_prefix += fold16(prefix, SECRET[0] + seed, SECRET[1] - seed);
    keyed.of_prefix += fold16(prefix + 16, SECRET[4] + seed, SECRET[5] - seed);
    return keyed;
}

/* tail: the last 32 bytes of the key. */
static inline uint64_t finish(const Keyed *keyed, const uint8_t *tail)
{
    uint64_t hash = keyed->of_prefix + fold16(tail, keyed->keyed[0], keyed->keyed[1]);
    hash += fold16(tail + 16, keyed->keyed[2], keyed->keyed[3]);
    hash = (hash ^ hash >> 37) * 0x165667919E3779F9ULL;
    return hash ^ hash >> 32;
}

static void hash_all(const uint8_t *prefix, const uint8_t *hashes, size_t size, size_t count, uint64_t seed, uint64_t *out)
{
    Keyed keyed = begin(prefix, PREFIX_BYTES + size, seed);
    uint8_t key[PREFIX_BYTES + HASH_BYTES_MAX];
    memcpy(key, prefix, PREFIX_BYTES);
    for (size_t i = 0; i < count; i++) {
        const uint8_t *tail = hashes + i * size;
        if (size < 32) { /* its last 32 bytes begin in the prefix */
            memcpy(key + PREFIX_BYTES, tail, size);
            tail = key + size;
        }
        uint64_t hash = finish(&keyed, tail);
        out[i] = hash - (hash << 12 >> 12 == UINT64_MAX >> 12);
    }
}

PyObject *hash_keys(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer prefix, hashes, out;
    Py_ssize_t size, start;
    unsigned long long seed;
    if (!PyArg_ParseTuple(args, "y*ny*Kw*n", &prefix, &size, &hashes, &seed, &out, &start))
        return NULL;
    int ok = prefix.len == PREFIX_BYTES && 1 <= size && size <= HASH_BYTES_MAX && hashes.len % size == 0;
    Py_ssize_t count = ok ? hashes.len / size : 0;
    ok = ok && start >= 0 && start <= out.len / 8 - count && (uintptr_t)out.buf % 8 == 0;
    if (ok)
        hash_all(prefix.buf, hashes.buf, (size_t)size, (size_t)count, seed, (uint64_t *)out.buf + start);
    else
        PyErr_SetString(PyExc_ValueError, "a prefix has 32 bytes, a hash 1 to 32, and there must be room for all");
    PyBuffer_Release(&prefix);
    PyBuffer_Release(&hashes);
    PyBuffer_Release(&out);
    if (!ok)
        return NULL;
    Py_RETURN_NONE;
}
