/* Bulk bytes without the GIL: copies, socket transfers and generation tables over whole lists of ranges.
 *
 * Every function takes plain addresses; kvshare/native.py is the typed face and says who keeps the memory alive.
 */
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>

#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

#define IOVECS_MAX 1024 /* the kernel's limit for one sendmsg or recvmsg */

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
    for (Py_ssize_t i = 0; i < arrays[0].count; i++)
        memcpy((void *)(uintptr_t)arrays[0].items[i], (const void *)(uintptr_t)arrays[1].items[i], arrays[2].items[i]);
    Py_END_ALLOW_THREADS
    give_arrays(arrays, 3);
    Py_RETURN_NONE;
}

/* --- sockets ---------------------------------------------------------------------------------------------------- */

/* Where a transfer stands within its ranges. */
typedef struct {
    const uint64_t *addresses;
    const uint64_t *lengths;
    Py_ssize_t count;
    Py_ssize_t at;   /* the range under way */
    uint64_t offset; /* bytes of it that are done */
} Cursor;

static int fill(const Cursor *cursor, struct iovec *vectors)
{
    int filled = 0;
    uint64_t offset = cursor->offset;
    for (Py_ssize_t i = cursor->at; i < cursor->count && filled < IOVECS_MAX; i++) {
        if (cursor->lengths[i] > offset) {
            vectors[filled].iov_base = (void *)(uintptr_t)(cursor->addresses[i] + offset);
            vectors[filled].iov_len = cursor->lengths[i] - offset;
            filled++;
        }
        offset = 0;
    }
    return filled;
}

static void advance(Cursor *cursor, uint64_t moved)
{
    while (moved > 0) {
        uint64_t left = cursor->lengths[cursor->at] - cursor->offset;
        if (moved < left) {
            cursor->offset += moved;
            return;
        }
        moved -= left;
        cursor->at++;
        cursor->offset = 0;
    }
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

typedef enum { MOVED, TIMED_OUT, CLOSED, FAILED, SIGNALLED } Outcome;

/* Wait until the socket can move bytes. `deadline` is absolute. */
static Outcome wait_ready(int fd, short events, double deadline)
{
    double left = deadline - now();
    if (left <= 0)
        return TIMED_OUT;
    struct pollfd entry = {.fd = fd, .events = events};
    int milliseconds = left > 2e6 ? 2000000000 : (int)(left * 1e3) + 1;
    int ready = poll(&entry, 1, milliseconds);
    if (ready > 0)
        return MOVED; /* errors and hang-ups are told by the next sendmsg or recvmsg */
    if (ready == 0)
        return TIMED_OUT;
    return errno == EINTR ? SIGNALLED : FAILED;
}

/* Move bytes until all ranges are done or something happens that Python has to hear of. Runs without the GIL. */
static Outcome move(int fd, int sending, Cursor *cursor, double seconds, double *deadline, uint64_t *total)
{
    struct iovec vectors[IOVECS_MAX];
    for (;;) {
        int filled = fill(cursor, vectors);
        if (filled == 0)
            return MOVED;
        struct msghdr message = {.msg_iov = vectors, .msg_iovlen = (size_t)filled};
        /* MSG_DONTWAIT: the socket may be a blocking one; the time limit is ours. */
        ssize_t moved = sending ? sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT) : recvmsg(fd, &message, MSG_DONTWAIT);
        if (moved > 0) {
            advance(cursor, (uint64_t)moved);
            *total += (uint64_t)moved;
            *deadline = now() + seconds;
            continue;
        }
        if (moved == 0 && !sending)
            return CLOSED;
        if (moved < 0 && errno == EINTR)
            return SIGNALLED;
        if (moved < 0 && errno != EAGAIN && errno != EWOULDBLOCK)
            return FAILED;
        Outcome outcome = wait_ready(fd, sending ? POLLOUT : POLLIN, *deadline);
        if (outcome != MOVED)
            return outcome;
    }
}

static PyObject *tell(Outcome outcome, int error, int sending, uint64_t total)
{
    const char *verb = sending ? "sent" : "received";
    switch (outcome) {
    case MOVED:
        return PyLong_FromUnsignedLongLong(total);
    case TIMED_OUT:
        return PyErr_Format(PyExc_TimeoutError, "no progress after %llu bytes %s", (unsigned long long)total, verb);
    case CLOSED:
        return PyErr_Format(PyExc_ConnectionError, "the other side closed after %llu bytes %s", (unsigned long long)total, verb);
    default:
        return PyErr_Format(PyExc_ConnectionError, "%s after %llu bytes %s", strerror(error), (unsigned long long)total, verb);
    }
}

static PyObject *transfer(PyObject *const *args, Py_ssize_t nargs, int sending)
{
    static const char *const names[] = {"addresses", "lengths"};
    if (nargs != 4) {
        PyErr_SetString(PyExc_TypeError, "(fd, addresses, lengths, seconds)");
        return NULL;
    }
    long fd = PyLong_AsLong(args[0]);
    if (fd == -1 && PyErr_Occurred())
        return NULL;
    double seconds = PyFloat_AsDouble(args[3]);
    if (seconds == -1.0 && PyErr_Occurred())
        return NULL;
    Array arrays[2];
    if (take_equal(args + 1, names, 2, arrays) < 0)
        return NULL;
    Cursor cursor = {.addresses = arrays[0].items, .lengths = arrays[1].items, .count = arrays[0].count};
    uint64_t total = 0;
    double deadline = now() + seconds;
    Outcome outcome;
    int error, raised = 0;
    do {
        Py_BEGIN_ALLOW_THREADS
        outcome = move((int)fd, sending, &cursor, seconds, &deadline, &total);
        error = errno;
        Py_END_ALLOW_THREADS
        raised = outcome == SIGNALLED && PyErr_CheckSignals() < 0;
    } while (outcome == SIGNALLED && !raised);
    give_arrays(arrays, 2);
    return raised ? NULL : tell(outcome, error, sending, total);
}

static PyObject *send_ranges(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    return transfer(args, nargs, 1);
}

static PyObject *recv_ranges(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    return transfer(args, nargs, 0);
}

/* --- generations ------------------------------------------------------------------------------------------------ */

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
        /* The caller has copied slots: those loads must be over before ours (an acquire load alone lets them sink). */
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
    {"send_ranges", (PyCFunction)(void (*)(void))send_ranges, METH_FASTCALL, NULL},
    {"recv_ranges", (PyCFunction)(void (*)(void))recv_ranges, METH_FASTCALL, NULL},
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
