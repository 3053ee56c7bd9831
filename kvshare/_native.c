/* Bulk bytes without the GIL: copies, socket transfers and generation tables over whole lists of ranges.
 * The moving itself is in _moves.c, reads of slots in _slots.c and (over sockets) _exchange.c, the
 * checksum in _xxh3.c.
 *
 * Every function takes plain addresses; kvshare/native.py is the typed face and says who keeps the memory alive.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <stdint.h>
#include <string.h>

#include "_arrays.h"
#include "_exchange.h"
#include "_moves.h"
#include "_slots.h"

static PyObject *copy_ranges(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    static const char *const names[] = {"targets", "sources", "lengths"};
    Array arrays[3];
    if (nargs != 3) {
        PyErr_SetString(PyExc_TypeError, "copy_ranges(targets, sources, lengths)");
        return NULL;
    }
    if (take_equal(args, names, 3, arrays) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    copy_all(arrays[0].items, arrays[1].items, arrays[2].items, (size_t)arrays[0].count, NULL);
    Py_END_ALLOW_THREADS
    give_arrays(arrays, 3);
    Py_RETURN_NONE;
}

/* Blocks of `pages` ranges each: seeds and room for digests, one per block. */
static int take_blocks(PyObject *const *objects, Py_ssize_t pages, Py_ssize_t ranges, Array *arrays)
{
    if (take_array(objects[0], PyBUF_SIMPLE, "seeds", &arrays[0]) < 0)
        return -1;
    if (take_array(objects[1], PyBUF_WRITABLE, "digests", &arrays[1]) < 0) {
        PyBuffer_Release(&arrays[0].buffer);
        return -1;
    }
    if (pages < 1 || arrays[0].count != arrays[1].count || arrays[0].count > ranges / pages) {
        PyErr_SetString(PyExc_ValueError, "seeds and digests need one entry per block of ranges");
        give_arrays(arrays, 2);
        return -1;
    }
    return 0;
}

static PyObject *copy_blocks(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    static const char *const names[] = {"targets", "lengths", "sources"};
    if (nargs != 6) {
        PyErr_SetString(PyExc_TypeError, "copy_blocks(targets, lengths, sources or None, pages, seeds, digests)");
        return NULL;
    }
    int count = args[2] == Py_None ? 2 : 3;
    Py_ssize_t pages = PyLong_AsSsize_t(args[3]);
    if (pages == -1 && PyErr_Occurred())
        return NULL;
    Array arrays[3], blocks[2];
    if (take_equal(args, names, count, arrays) < 0)
        return NULL;
    if (take_blocks(args + 4, pages, arrays[0].count, blocks) < 0) {
        give_arrays(arrays, count);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    Hasher hasher;
    hasher_begin(&hasher, blocks[0].items, blocks[1].items, (size_t)blocks[0].count, (size_t)pages);
    copy_all(arrays[0].items, count == 3 ? arrays[2].items : NULL, arrays[1].items, (size_t)arrays[0].count, &hasher);
    Py_END_ALLOW_THREADS
    give_arrays(arrays, count);
    give_arrays(blocks, 2);
    Py_RETURN_NONE;
}

/* --- sockets ---------------------------------------------------------------------------------------------------- */

/* A signal came in a thread that holds no GIL: let Python handle it, as it does after each of its own system calls. */
static int interrupted(void)
{
    PyGILState_STATE state = PyGILState_Ensure();
    int raised = PyErr_CheckSignals() < 0;
    PyGILState_Release(state);
    return raised;
}

/* Raise what a transfer ended by; NULL always. */
static PyObject *raise_outcome(Outcome outcome, int error)
{
    switch (outcome) {
    case INTERRUPTED: /* by an exception that is raised already */
        return NULL;
    case TIMED_OUT:
        PyErr_SetString(PyExc_TimeoutError, "no progress in the time allowed");
        return NULL;
    case CLOSED:
        PyErr_SetString(PyExc_ConnectionError, "the other side closed the connection");
        return NULL;
    case GARBLED:
        PyErr_SetString(PyExc_ValueError, "an answer that is none");
        return NULL;
    default:
        PyErr_SetString(PyExc_ConnectionError, strerror(error));
        return NULL;
    }
}

/* args: fd, addresses, lengths, seconds. */
static PyObject *transfer(PyObject *const *args, int sending)
{
    static const char *const names[] = {"addresses", "lengths"};
    long fd = PyLong_AsLong(args[0]);
    double seconds = PyFloat_AsDouble(args[3]);
    Array arrays[2];
    if (PyErr_Occurred() || take_equal(args + 1, names, 2, arrays) < 0)
        return NULL;
    Stream stream = {.fd = (int)fd, .sending = sending, .seconds = seconds, .interrupted = interrupted};
    stream.addresses = arrays[0].items;
    stream.lengths = arrays[1].items;
    stream.count = (size_t)arrays[0].count;
    Outcome outcome;
    int error;
    Py_BEGIN_ALLOW_THREADS
    outcome = stream_run(&stream);
    error = errno;
    Py_END_ALLOW_THREADS
    give_arrays(arrays, 2);
    return outcome == MOVED ? PyLong_FromUnsignedLongLong(stream.total) : raise_outcome(outcome, error);
}

static PyObject *send_ranges(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs == 4)
        return transfer(args, 1);
    PyErr_SetString(PyExc_TypeError, "send_ranges(fd, addresses, lengths, seconds)");
    return NULL;
}

static PyObject *recv_ranges(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs == 4)
        return transfer(args, 0);
    PyErr_SetString(PyExc_TypeError, "recv_ranges(fd, addresses, lengths, seconds)");
    return NULL;
}

static PyObject *send_slots(PyObject *Py_UNUSED(module), PyObject *args)
{
    static const char *const names[] = {"slots", "expected"};
    unsigned long long table, data, slot_bytes, available, length;
    PyObject *objects[2];
    Py_ssize_t portion_blocks;
    Answer answer = {.interrupted = interrupted};
    Array arrays[2];
    if (!PyArg_ParseTuple(args, "idKKKKOOKn", &answer.fd, &answer.seconds, &table, &data, &slot_bytes, &available, &objects[0],
                          &objects[1], &length, &portion_blocks))
        return NULL;
    if (take_equal(objects, names, 2, arrays) < 0)
        return NULL;
    answer.table = pointer(table);
    answer.data = pointer(data);
    answer.slot_bytes = slot_bytes;
    answer.available = available;
    answer.slots = (const int64_t *)arrays[0].items;
    answer.expected = arrays[1].items;
    answer.count = (size_t)arrays[0].count;
    answer.length = length;
    answer.portion_blocks = portion_blocks < 1 ? 1 : (size_t)portion_blocks;
    Outcome outcome;
    int error;
    Py_BEGIN_ALLOW_THREADS
    outcome = send_answer(&answer);
    error = errno;
    Py_END_ALLOW_THREADS
    give_arrays(arrays, 2);
    return outcome == MOVED ? PyLong_FromUnsignedLongLong(answer.blocks_sent) : raise_outcome(outcome, error);
}

static PyObject *recv_slots(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    Reception reception = {.interrupted = interrupted};
    Wanted wanted;
    if (nargs != 9) {
        PyErr_SetString(PyExc_TypeError, "recv_slots takes 9 arguments");
        return NULL;
    }
    reception.fd = (int)PyLong_AsLong(args[0]);
    reception.seconds = PyFloat_AsDouble(args[1]);
    reception.portion_blocks = PyLong_AsSize_t(args[2]);
    if (PyErr_Occurred() || take_wanted(args + 3, 3, &wanted) < 0)
        return NULL;
    reception.expected = wanted.blocks[0].items;
    reception.seeds = wanted.blocks[1].items;
    reception.checksums = wanted.blocks[2].items;
    reception.count = (size_t)wanted.blocks[0].count;
    reception.targets = wanted.pages[0].items;
    reception.page_bytes = wanted.pages[1].items;
    reception.pages = (size_t)wanted.pages[1].count;
    reception.statuses = wanted.statuses.buf;
    reception.portion_blocks += reception.portion_blocks == 0;
    Outcome outcome;
    int error;
    Py_BEGIN_ALLOW_THREADS
    outcome = receive_answer(&reception);
    error = errno;
    Py_END_ALLOW_THREADS
    give_wanted(&wanted, 3);
    return outcome == MOVED ? PyLong_FromSize_t(reception.ok) : raise_outcome(outcome, error);
}

/* --- other processes -------------------------------------------------------------------------------------------- */

static PyObject *read_process_(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    static const char *const names[] = {"targets", "sources", "lengths"};
    Array arrays[3];
    if (nargs != 4) {
        PyErr_SetString(PyExc_TypeError, "read_process(pid, targets, sources, lengths)");
        return NULL;
    }
    long pid = PyLong_AsLong(args[0]);
    if (PyErr_Occurred() || take_equal(args + 1, names, 3, arrays) < 0)
        return NULL;
    uint64_t total = 0;
    for (Py_ssize_t i = 0; i < arrays[2].count; i++)
        total += arrays[2].items[i];
    int error;
    Py_BEGIN_ALLOW_THREADS
    error = read_process((pid_t)pid, arrays[0].items, arrays[1].items, arrays[2].items, (size_t)arrays[0].count);
    Py_END_ALLOW_THREADS
    give_arrays(arrays, 3);
    if (error == 0)
        return PyLong_FromUnsignedLongLong(total);
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

/* --- generations ------------------------------------------------------------------------------------------------ */

static PyObject *read_slots_(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    unsigned long long numbers[4]; /* table, data, slot_bytes, available */
    Wanted wanted;
    if (nargs != 11) {
        PyErr_SetString(PyExc_TypeError, "read_slots takes 11 arguments");
        return NULL;
    }
    for (int i = 0; i < 4; i++)
        numbers[i] = PyLong_AsUnsignedLongLong(args[i]);
    if (PyErr_Occurred() || take_wanted(args + 4, 4, &wanted) < 0)
        return NULL;
    SlotRead read = {.table = pointer(numbers[0]), .data = pointer(numbers[1]), .slot_bytes = numbers[2]};
    read.available = numbers[3];
    read.expected = wanted.blocks[0].items;
    read.seeds = wanted.blocks[1].items;
    read.checksums = wanted.blocks[2].items;
    read.slots = (const int64_t *)wanted.blocks[3].items;
    read.count = (size_t)wanted.blocks[0].count;
    read.targets = wanted.pages[0].items;
    read.page_bytes = wanted.pages[1].items;
    read.pages = (size_t)wanted.pages[1].count;
    read.statuses = wanted.statuses.buf;
    size_t ok;
    Py_BEGIN_ALLOW_THREADS
    ok = read_slots(&read);
    Py_END_ALLOW_THREADS
    give_wanted(&wanted, 4);
    return PyLong_FromSize_t(ok);
}

static PyObject *load_generations(PyObject *Py_UNUSED(module), PyObject *args)
{
    unsigned long long table, stride;
    PyObject *slots_object, *out_object;
    Array slots, out;
    if (!PyArg_ParseTuple(args, "KKOO", &table, &stride, &slots_object, &out_object))
        return NULL;
    if (take_array(slots_object, PyBUF_SIMPLE, "slots", &slots) < 0)
        return NULL;
    if (take_array(out_object, PyBUF_WRITABLE, "out", &out) < 0) {
        PyBuffer_Release(&slots.buffer);
        return NULL;
    }
    int equal = slots.count == out.count;
    if (equal) {
        /* What this thread read before is over. */
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        for (Py_ssize_t i = 0; i < slots.count; i++)
            out.items[i] = __atomic_load_n((uint64_t *)(uintptr_t)(table + stride * slots.items[i]), __ATOMIC_ACQUIRE);
    } else {
        PyErr_SetString(PyExc_ValueError, "slots and out differ in length");
    }
    PyBuffer_Release(&slots.buffer);
    PyBuffer_Release(&out.buffer);
    if (!equal)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *store_generation(PyObject *Py_UNUSED(module), PyObject *args)
{
    unsigned long long address, value;
    if (!PyArg_ParseTuple(args, "KK", &address, &value))
        return NULL;
    /* Release: what was written before is seen before. Then a full fence: an odd generation is seen before the bytes
     * that are written after it, which a release store alone does not promise. */
    __atomic_store_n((uint64_t *)(uintptr_t)address, (uint64_t)value, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    Py_RETURN_NONE;
}

/* --- addresses -------------------------------------------------------------------------------------------------- */

static PyObject *view(PyObject *Py_UNUSED(module), PyObject *args)
{
    unsigned long long address;
    Py_ssize_t length;
    int writable;
    if (!PyArg_ParseTuple(args, "Knp", &address, &length, &writable))
        return NULL;
    if (length < 0) {
        PyErr_SetString(PyExc_ValueError, "a length is not negative");
        return NULL;
    }
    return PyMemoryView_FromMemory((char *)(uintptr_t)address, length, writable ? PyBUF_WRITE : PyBUF_READ);
}

static PyObject *address_of(PyObject *Py_UNUSED(module), PyObject *object)
{
    Py_buffer buffer;
    if (PyObject_GetBuffer(object, &buffer, PyBUF_SIMPLE) < 0)
        return NULL;
    PyObject *address = PyLong_FromVoidPtr(buffer.buf);
    PyBuffer_Release(&buffer);
    return address;
}

static PyMethodDef methods[] = {
    {"copy_ranges", (PyCFunction)(void (*)(void))copy_ranges, METH_FASTCALL, NULL},
    {"copy_blocks", (PyCFunction)(void (*)(void))copy_blocks, METH_FASTCALL, NULL},
    {"send_ranges", (PyCFunction)(void (*)(void))send_ranges, METH_FASTCALL, NULL},
    {"recv_ranges", (PyCFunction)(void (*)(void))recv_ranges, METH_FASTCALL, NULL},
    {"read_slots", (PyCFunction)(void (*)(void))read_slots_, METH_FASTCALL, NULL},
    {"send_slots", send_slots, METH_VARARGS, NULL},
    {"recv_slots", (PyCFunction)(void (*)(void))recv_slots, METH_FASTCALL, NULL},
    {"read_process", (PyCFunction)(void (*)(void))read_process_, METH_FASTCALL, NULL},
    {"load_generations", load_generations, METH_VARARGS, NULL},
    {"store_generation", store_generation, METH_VARARGS, NULL},
    {"view", view, METH_VARARGS, NULL},
    {"address_of", address_of, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "kvshare._native", .m_size = 0, .m_methods = methods,
};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModule_Create(&definition);
}
