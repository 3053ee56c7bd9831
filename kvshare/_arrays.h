/* Arguments of the extension's functions: arrays borrowed through the buffer protocol. */
#ifndef KVSHARE_ARRAYS_H
#define KVSHARE_ARRAYS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>

static inline void *pointer(unsigned long long address)
{
    return (void *)(uintptr_t)address;
}

/* A borrowed array of 64-bit numbers. */
typedef struct {
    Py_buffer buffer;
    uint64_t *items;
    Py_ssize_t count;
} Array;

static int take_array(PyObject *object, int flags, const char *what, Array *array)
{
    if (PyObject_GetBuffer(object, &array->buffer, flags | PyBUF_C_CONTIGUOUS) < 0)
        return -1;
    if (array->buffer.itemsize != 8) {
        PyErr_Format(PyExc_TypeError, "%s must hold 64-bit integers", what);
        PyBuffer_Release(&array->buffer);
        return -1;
    }
    array->items = array->buffer.buf;
    array->count = array->buffer.len / 8;
    return 0;
}

static void give_arrays(Array *arrays, int count)
{
    for (int i = 0; i < count; i++)
        PyBuffer_Release(&arrays[i].buffer);
}

/* Take `count` arrays that must have equal lengths; on failure none is held. */
static int take_equal(PyObject *const *objects, const char *const *names, int count, Array *arrays)
{
    for (int i = 0; i < count; i++) {
        if (take_array(objects[i], PyBUF_SIMPLE, names[i], &arrays[i]) < 0) {
            give_arrays(arrays, i);
            return -1;
        }
        if (arrays[i].count != arrays[0].count) {
            PyErr_Format(PyExc_ValueError, "%s and %s differ in length", names[0], names[i]);
            give_arrays(arrays, i + 1);
            return -1;
        }
    }
    return 0;
}

/* What a read is given per block and per page, as the last arguments of a call. */
typedef struct {
    Array blocks[4]; /* expected, seeds, checksums; slots or nothing */
    Array pages[2];  /* targets, page_bytes */
    Py_buffer statuses;
} Wanted;

static void give_wanted(Wanted *wanted, int blocks)
{
    give_arrays(wanted->blocks, blocks);
    give_arrays(wanted->pages, 2);
    PyBuffer_Release(&wanted->statuses);
}

/* objects: as many arrays of blocks as said, targets, page_bytes, statuses. */
static int take_wanted(PyObject *const *objects, int blocks, Wanted *wanted)
{
    static const char *const names[] = {"expected", "seeds", "checksums", "slots"};
    if (take_equal(objects, names, blocks, wanted->blocks) < 0)
        return -1;
    if (take_array(objects[blocks], PyBUF_SIMPLE, "targets", &wanted->pages[0]) < 0) {
        give_arrays(wanted->blocks, blocks);
        return -1;
    }
    if (take_array(objects[blocks + 1], PyBUF_SIMPLE, "page_bytes", &wanted->pages[1]) < 0) {
        give_arrays(wanted->blocks, blocks);
        give_arrays(wanted->pages, 1);
        return -1;
    }
    if (PyObject_GetBuffer(objects[blocks + 2], &wanted->statuses, PyBUF_WRITABLE) < 0) {
        give_arrays(wanted->blocks, blocks);
        give_arrays(wanted->pages, 2);
        return -1;
    }
    Py_ssize_t count = wanted->blocks[0].count;
    if (wanted->pages[0].count == count * wanted->pages[1].count && wanted->statuses.len == count)
        return 0;
    PyErr_SetString(PyExc_ValueError, "one address per block and page, one status per block");
    give_wanted(wanted, blocks);
    return -1;
}

#endif
