/* The index of the directory, as Python sees it; kvshare/index.py is the typed face. Nodes are numbers here, lists columns. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_fingerprints.h"
#include "_index_table.h"

typedef struct {
    PyObject_HEAD
    Table *table; /* NULL only while it is being made */
} Memberships;

static Table *table_of(PyObject *self)
{
    return ((Memberships *)self)->table;
}

/* --- arguments -------------------------------------------------------------------------------------------------- */

/* A column of hashes that a call was given. */
typedef struct {
    Py_buffer buffer;
    const uint64_t *items;
    size_t count;
} Hashes;

static int fits(const Py_buffer *column, size_t item, size_t count)
{
    return (size_t)column->len == item * count && (uintptr_t)column->buf % item == 0;
}

/* "O&" of PyArg_ParseTuple. */
static int take_hashes(PyObject *object, void *taken)
{
    Hashes *hashes = taken;
    if (object == NULL) { /* another argument was wrong */
        PyBuffer_Release(&hashes->buffer);
        return 1;
    }
    if (PyObject_GetBuffer(object, &hashes->buffer, PyBUF_SIMPLE) < 0)
        return 0;
    hashes->items = hashes->buffer.buf;
    hashes->count = (size_t)hashes->buffer.len / 8;
    if (fits(&hashes->buffer, 8, hashes->count))
        return Py_CLEANUP_SUPPORTED;
    PyErr_SetString(PyExc_ValueError, "hashes are uint64");
    PyBuffer_Release(&hashes->buffer);
    return 0;
}

/* -1 with an exception: this number has never been added to, and mustn't be asked for. */
static int known(const Table *table, unsigned node)
{
    if (node < table->nodes_room && table->nodes[node] != NULL)
        return 0;
    PyErr_Format(PyExc_KeyError, "node %u", node);
    return -1;
}

/* --- life ------------------------------------------------------------------------------------------------------- */

static PyObject *begin(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(kwargs))
{
    unsigned long long keys_max, entries_max;
    if (!PyArg_ParseTuple(args, "KK", &keys_max, &entries_max))
        return NULL;
    Memberships *self = (Memberships *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->table = table_begin(keys_max, entries_max);
    if (self->table == NULL) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static void end(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    if (table_of(self) != NULL)
        table_end(table_of(self));
    type->tp_free(self);
    Py_DECREF(type);
}

/* --- what changes it -------------------------------------------------------------------------------------------- */

static PyObject *add(PyObject *self, PyObject *args)
{
    unsigned node, expires;
    Hashes hashes;
    Py_buffer slots, generations;
    long long region, length;
    if (!PyArg_ParseTuple(args, "IO&LLIy*y*", &node, take_hashes, &hashes, &region, &length, &expires, &slots, &generations))
        return NULL;
    PyObject *result = NULL;
    if (!fits(&slots, 4, hashes.count) || !fits(&generations, 8, hashes.count) || node >= NODES_MAX) {
        PyErr_SetString(PyExc_ValueError, "slots are uint32, generations uint64, one for each key; nodes have small numbers");
    } else if (table_know(table_of(self), node) < 0) {
        PyErr_NoMemory();
    } else {
        Blocks blocks = {hashes.items, slots.buf, generations.buf, hashes.count, region, length, expires};
        result = PyLong_FromSize_t(table_add(table_of(self), node, &blocks));
    }
    PyBuffer_Release(&hashes.buffer);
    PyBuffer_Release(&slots);
    PyBuffer_Release(&generations);
    return result;
}

static PyObject *remove_keys(PyObject *self, PyObject *args)
{
    unsigned node;
    Hashes hashes;
    if (!PyArg_ParseTuple(args, "IO&", &node, take_hashes, &hashes))
        return NULL;
    int ok = known(table_of(self), node) == 0;
    if (ok)
        table_remove(table_of(self), node, hashes.items, hashes.count);
    PyBuffer_Release(&hashes.buffer);
    if (!ok)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *drop(PyObject *self, PyObject *args)
{
    unsigned node;
    unsigned long long parts;
    if (!PyArg_ParseTuple(args, "IK", &node, &parts) || known(table_of(self), node) < 0)
        return NULL;
    table_drop(table_of(self), node, parts);
    Py_RETURN_NONE;
}

static PyObject *sweep(PyObject *self, PyObject *banks)
{
    unsigned long count = PyLong_AsUnsignedLong(banks);
    if (PyErr_Occurred())
        return NULL;
    return PyBool_FromLong(table_sweep(table_of(self), (uint32_t)count));
}

/* --- questions -------------------------------------------------------------------------------------------------- */

/* Room for as many locations, in one piece. -1: no memory. */
static int make_room(Table *table, Answer *answer, size_t keys, size_t locations)
{
    size_t bytes = 22 * locations + keys + 8;
    if (bytes > table->answers_bytes) {
        char *larger = realloc(table->answers, bytes);
        if (larger == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        table->answers = larger;
        table->answers_bytes = bytes;
    }
    char *room = table->answers;
    answer->generations = (uint64_t *)room;
    answer->slots = (uint32_t *)(room + 8 * locations);
    answer->expires = answer->slots + locations;
    answer->numbers = answer->expires + locations;
    answer->place = (uint16_t *)(answer->numbers + locations);
    answer->counts = (uint8_t *)(answer->place + locations);
    answer->locations = answer->numbered = 0;
    answer->any_ends = 0;
    return 0;
}

static PyObject *find(PyObject *self, PyObject *args)
{
    Hashes hashes;
    Py_buffer ranks;
    unsigned most;
    if (!PyArg_ParseTuple(args, "O&z*I", take_hashes, &hashes, &ranks, &most))
        return NULL;
    Table *table = table_of(self);
    Answer answer;
    PyObject *result = NULL;
    if ((ranks.buf != NULL && (size_t)ranks.len != table->places_count) || most < 1 || most > RANK_NEVER) {
        PyErr_SetString(PyExc_ValueError, "a rank is needed for each place, and 1 to 255 locations can be told");
    } else if (make_room(table, &answer, hashes.count, hashes.count * most) == 0) {
        table_find(table, hashes.items, hashes.count, ranks.buf, most, &answer);
        Py_ssize_t found = (Py_ssize_t)answer.locations;
        result = Py_BuildValue("y#y#y#y#y#y#", answer.counts, (Py_ssize_t)hashes.count, answer.place, 2 * found, answer.slots,
                               4 * found, answer.generations, 8 * found, answer.expires, answer.any_ends ? 4 * found : 0,
                               answer.numbers, (Py_ssize_t)(4 * answer.numbered));
    }
    PyBuffer_Release(&hashes.buffer);
    PyBuffer_Release(&ranks);
    return result;
}

static PyObject *held(PyObject *self, PyObject *args)
{
    Hashes hashes;
    if (!PyArg_ParseTuple(args, "O&", take_hashes, &hashes))
        return NULL;
    PyObject *result = PyLong_FromSize_t(table_held(table_of(self), hashes.items, hashes.count));
    PyBuffer_Release(&hashes.buffer);
    return result;
}

static PyObject *holds(PyObject *self, PyObject *args)
{
    unsigned node;
    Hashes hashes;
    if (!PyArg_ParseTuple(args, "IO&", &node, take_hashes, &hashes))
        return NULL;
    PyObject *out = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)hashes.count);
    if (out != NULL)
        table_holds(table_of(self), node, hashes.items, hashes.count, (uint8_t *)PyBytes_AS_STRING(out));
    PyBuffer_Release(&hashes.buffer);
    return out;
}

/* [(node, how many leading keys it holds)] */
static PyObject *depths(PyObject *self, PyObject *args)
{
    Hashes hashes;
    if (!PyArg_ParseTuple(args, "O&", take_hashes, &hashes))
        return NULL;
    Table *table = table_of(self);
    PyObject *result = NULL;
    uint32_t *found = PyMem_Malloc(((size_t)table->nodes_room + 1) * sizeof *found), count = 0;
    if (found == NULL) {
        PyErr_NoMemory();
    } else {
        count = table_depths(table, hashes.items, hashes.count, found);
        result = PyList_New(count);
    }
    for (uint32_t i = 0; i < count; i++) {
        PyObject *item = result == NULL ? NULL : Py_BuildValue("II", found[i], table->depths[found[i]]);
        table->depths[found[i]] = 0;
        if (item == NULL)
            Py_CLEAR(result);
        else
            PyList_SET_ITEM(result, i, item);
    }
    PyMem_Free(found);
    PyBuffer_Release(&hashes.buffer);
    return result;
}

/* --- about it --------------------------------------------------------------------------------------------------- */

/* uint64 [PARTS], as bytes. */
static PyObject *digests(PyObject *self, PyObject *node)
{
    unsigned long number = PyLong_AsUnsignedLong(node);
    if (PyErr_Occurred() || known(table_of(self), (unsigned)number) < 0)
        return NULL;
    const Node *found = table_of(self)->nodes[number];
    return PyBytes_FromStringAndSize((const char *)found->digests, sizeof found->digests);
}

/* (how many keys a node holds, how many places are its own) */
static PyObject *about(PyObject *self, PyObject *node)
{
    unsigned long number = PyLong_AsUnsignedLong(node);
    if (PyErr_Occurred() || known(table_of(self), (unsigned)number) < 0)
        return NULL;
    const Node *found = table_of(self)->nodes[number];
    unsigned long long count = 0;
    for (int part = 0; part < PARTS; part++)
        count += found->held[part];
    return Py_BuildValue("KI", count, found->places);
}

/* For each number of a place: (node, region, length), or None where nothing alive can have it. */
static PyObject *places(PyObject *self, PyObject *Py_UNUSED(nothing))
{
    const Table *table = table_of(self);
    PyObject *result = PyList_New(table->places_count);
    for (uint32_t i = 0; result != NULL && i < table->places_count; i++) {
        const Place *place = &table->places[i];
        PyObject *item = place->entries == 0 || table->dead[i] == ALL_PARTS
                             ? Py_NewRef(Py_None)
                             : Py_BuildValue("ILL", place->node, (long long)place->region, (long long)place->length);
        if (item == NULL)
            Py_CLEAR(result);
        else
            PyList_SET_ITEM(result, i, item);
    }
    return result;
}

/* (keys, entries, those of them that are dead, bytes, version of the places) */
static PyObject *totals(PyObject *self, PyObject *Py_UNUSED(nothing))
{
    const Table *table = table_of(self);
    return Py_BuildValue("KKKnK", (unsigned long long)table->keys, (unsigned long long)table->entries,
                         (unsigned long long)table->dead_entries, (Py_ssize_t)table_bytes(table),
                         (unsigned long long)table->version);
}

static PyObject *version(PyObject *self, PyObject *Py_UNUSED(nothing))
{
    return PyLong_FromUnsignedLongLong(table_of(self)->version);
}

static void complain(void *whom, const char *what, uint64_t where, uint64_t is, uint64_t should)
{
    static const Py_ssize_t TOLD_MAX = 100;
    if (PyList_GET_SIZE((PyObject *)whom) >= TOLD_MAX || PyErr_Occurred())
        return;
    PyObject *text = PyUnicode_FromFormat("%s (%llu: %llu, should be %llu)", what, where, is, should);
    if (text != NULL)
        PyList_Append(whom, text);
    Py_XDECREF(text);
}

static PyObject *check(PyObject *self, PyObject *Py_UNUSED(nothing))
{
    PyObject *problems = PyList_New(0);
    if (problems != NULL && table_check(table_of(self), complain, problems) < 0)
        PyErr_NoMemory();
    if (PyErr_Occurred())
        Py_CLEAR(problems);
    return problems;
}

static PyMethodDef methods[] = {
    {"add", add, METH_VARARGS, NULL},
    {"remove", remove_keys, METH_VARARGS, NULL},
    {"drop", drop, METH_VARARGS, NULL},
    {"sweep", sweep, METH_O, NULL},
    {"find", find, METH_VARARGS, NULL},
    {"held", held, METH_VARARGS, NULL},
    {"holds", holds, METH_VARARGS, NULL},
    {"depths", depths, METH_VARARGS, NULL},
    {"digests", digests, METH_O, NULL},
    {"about", about, METH_O, NULL},
    {"places", places, METH_NOARGS, NULL},
    {"totals", totals, METH_NOARGS, NULL},
    {"version", version, METH_NOARGS, NULL},
    {"check", check, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, begin},
    {Py_tp_dealloc, end},
    {Py_tp_methods, methods},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "kvshare._index.Memberships", .basicsize = sizeof(Memberships), .flags = Py_TPFLAGS_DEFAULT, .slots = slots,
};

static PyMethodDef functions[] = {
    {"hash_keys", hash_keys, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "kvshare._index", .m_size = 0, .m_methods = functions,
};

PyMODINIT_FUNC PyInit__index(void)
{
    PyObject *module = PyModule_Create(&definition), *type = module == NULL ? NULL : PyType_FromSpec(&spec);
    if (type == NULL || PyModule_AddObjectRef(module, "Memberships", type) < 0)
        Py_CLEAR(module);
    Py_XDECREF(type);
    return module;
}
