/* XXH3 of keys: 33 to 64 bytes, of which the first 32 are those of many. */
#ifndef KVSHARE_FINGERPRINTS_H
#define KVSHARE_FINGERPRINTS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define PREFIX_BYTES 32
#define HASH_BYTES_MAX 32

/* hash_keys(prefix, hash_bytes, hashes, seed, out, start): into `out`, uint64, from `start` on, of each key (the prefix, then
 * `hash_bytes` of `hashes`) its XXH3_64 with `seed`; one that ends in 52 ones has its last bit cleared. */
PyObject *hash_keys(PyObject *module, PyObject *args);

#endif
