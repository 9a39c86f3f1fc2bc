// All that is checked before a fused module in eval mode runs its operator, and the call of the
// operator: a dozen checks that in Python take as long as a small module's arithmetic. With the C
// API and no torch header; ghost_ops/cached_call.py has the same in Python, and documents each
// argument.
#include "python/cached_call.h"

#include <vector>

#include "python/watch.h"

namespace {

constexpr Py_ssize_t kMostArguments = 31;  // after x

struct CachedCall {
  PyObject_HEAD PyObject* watch;
  PyObject* guards;  // of pairs (function, arguments): each must answer False
  PyObject *tensor_type, *dtype, *device, *channels_last, *op, *arguments;
  long long channels;
};

PyObject *g_dtype, *g_device, *g_shape, *g_is_contiguous;  // interned attribute names
PyObject* g_memory_format;                                 // a tuple of that one keyword

template <class F>
int for_each(CachedCall* self, F&& f) {
  for (PyObject** p : {&self->watch, &self->guards, &self->tensor_type, &self->dtype, &self->device,
                       &self->channels_last, &self->op, &self->arguments})
    if (*p != nullptr)
      if (int stop = f(*p)) return stop;
  return 0;
}

int kept_clear(CachedCall* self) {
  return for_each(self, [](PyObject*& object) {
    PyObject* dropped = object;
    object = nullptr;  // first: a destructor may come back here
    Py_DECREF(dropped);
    return 0;
  });
}

int kept_traverse(CachedCall* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  return for_each(self, [&](PyObject* object) { return visit(object, arg); });
}

void kept_dealloc(CachedCall* self) {
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  kept_clear(self);
  type->tp_free(self);
  Py_DECREF(type);
}

bool are_guards(PyObject* guards) {
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(guards); ++k) {
    PyObject* pair = PyTuple_GET_ITEM(guards, k);
    if (!PyTuple_Check(pair) || PyTuple_GET_SIZE(pair) != 2 ||
        !PyTuple_Check(PyTuple_GET_ITEM(pair, 1)))
      return false;
  }
  return true;
}

PyObject* kept_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  static const char* kNames[] = {"watch",         "guards",   "tensor_type", "dtype",     "device",
                                 "channels_last", "channels", "operator",    "arguments", nullptr};
  PyObject *watch, *guards, *tensor_type, *dtype, *device, *channels_last, *op, *arguments;
  long long channels;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO!O!OOOLOO!:CachedCall",
                                   const_cast<char**>(kNames), &watch, &PyTuple_Type, &guards,
                                   &PyType_Type, &tensor_type, &dtype, &device, &channels_last,
                                   &channels, &op, &PyTuple_Type, &arguments))
    return nullptr;
  if (!is_watch(watch) || !are_guards(guards)) {
    PyErr_SetString(PyExc_TypeError,
                    "CachedCall: watch must be a Watch, guards pairs (function, arguments)");
    return nullptr;
  }
  if (PyTuple_GET_SIZE(arguments) > kMostArguments) {
    PyErr_Format(PyExc_ValueError, "CachedCall: at most %zd arguments, got %zd", kMostArguments,
                 PyTuple_GET_SIZE(arguments));
    return nullptr;
  }
  CachedCall* self = reinterpret_cast<CachedCall*>(type->tp_alloc(type, 0));
  if (self == nullptr) return nullptr;
  self->watch = Py_NewRef(watch);
  self->guards = Py_NewRef(guards);
  self->tensor_type = Py_NewRef(tensor_type);
  self->dtype = Py_NewRef(dtype);
  self->device = Py_NewRef(device);
  self->channels_last = Py_NewRef(channels_last);
  self->op = Py_NewRef(op);
  self->arguments = Py_NewRef(arguments);
  self->channels = channels;
  return reinterpret_cast<PyObject*>(self);
}

// Whether a new reference is `wanted`; false as well with an exception set.
bool is(PyObject* answer, PyObject* wanted) {
  Py_XDECREF(answer);  // what is compared with lives on elsewhere
  return answer == wanted;
}

bool guards_hold(PyObject* guards) {
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(guards); ++k) {
    PyObject* pair = PyTuple_GET_ITEM(guards, k);
    PyObject* with = PyTuple_GET_ITEM(pair, 1);
    PyObject* answer = PyObject_Vectorcall(PyTuple_GET_ITEM(pair, 0),
                                           reinterpret_cast<PyTupleObject*>(with)->ob_item,
                                           static_cast<size_t>(PyTuple_GET_SIZE(with)), nullptr);
    if (!is(answer, Py_False)) return false;
  }
  return true;
}

// [N, channels, H, W], none of them zero.
bool fits(PyObject* shape, long long channels) {
  if (shape == nullptr) return false;
  bool good = PyTuple_Check(shape) && PyTuple_GET_SIZE(shape) == 4;
  for (Py_ssize_t k = 0; good && k < 4; ++k) {
    const long long size = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, k));
    good = k == 1 ? size == channels : size > 0;
  }
  Py_DECREF(shape);
  return good;
}

bool is_dense(PyObject* x, PyObject* channels_last) {
  PyObject* answer = PyObject_CallMethodNoArgs(x, g_is_contiguous);
  if (answer == nullptr) return false;
  if (is(answer, Py_True)) return true;
  PyObject* with[] = {x, channels_last};
  return is(PyObject_VectorcallMethod(g_is_contiguous, with, 1, g_memory_format), Py_True);
}

bool on_device(PyObject* x, PyObject* wanted) {
  PyObject* device = PyObject_GetAttr(x, g_device);
  if (device == nullptr) return false;
  const int equal = PyObject_RichCompareBool(device, wanted, Py_EQ);
  Py_DECREF(device);
  return equal == 1;
}

bool may_run(CachedCall* self, PyObject* x, PyObject* own) {
  return reinterpret_cast<PyObject*>(Py_TYPE(x)) == self->tensor_type && PyDict_Check(own) &&
         is(PyObject_GetAttr(x, g_dtype), self->dtype) && on_device(x, self->device) &&
         fits(PyObject_GetAttr(x, g_shape), self->channels) && is_dense(x, self->channels_last) &&
         guards_hold(self->guards) && unchanged(self->watch, own);
}

PyObject* kept_run(CachedCall* self, PyObject* const* args, Py_ssize_t count) {
  if (count != 2) {
    PyErr_Format(PyExc_TypeError, "run takes x and a dictionary, got %zd arguments", count);
    return nullptr;
  }
  // Cleared by the garbage collector, which begins with the watch.
  if (self->watch == nullptr) Py_RETURN_NONE;
  // The guards and the operator may run Python that drops the last reference to this object.
  Py_INCREF(self);
  PyObject* result;
  if (may_run(self, args[0], args[1])) {
    PyObject* with[1 + kMostArguments] = {args[0]};
    const Py_ssize_t kept = PyTuple_GET_SIZE(self->arguments);
    for (Py_ssize_t k = 0; k < kept; ++k) with[1 + k] = PyTuple_GET_ITEM(self->arguments, k);
    result = PyObject_Vectorcall(self->op, with, static_cast<size_t>(kept + 1), nullptr);
  } else {
    // A check that raises fails; the general path then raises what is to be raised.
    PyErr_Clear();
    result = Py_NewRef(Py_None);
  }
  Py_DECREF(self);
  return result;
}

PyMethodDef g_methods[] = {
    {"run", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)(void)>(kept_run)),
     METH_FASTCALL, "The operator's result for x, or None where something does not fit."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot g_slots[] = {
    {Py_tp_doc, const_cast<char*>("CachedCall(...): see ghost_ops.cached_call.")},
    {Py_tp_new, reinterpret_cast<void*>(kept_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(kept_dealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(kept_traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(kept_clear)},
    {Py_tp_methods, g_methods},
    {0, nullptr},
};

PyType_Spec g_spec = {"ghost_ops._C.CachedCall", sizeof(CachedCall), 0,
                      Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, g_slots};

}  // namespace

int add_cached_call_type(PyObject* module) {
  g_dtype = PyUnicode_InternFromString("dtype");
  g_device = PyUnicode_InternFromString("device");
  g_shape = PyUnicode_InternFromString("shape");
  g_is_contiguous = PyUnicode_InternFromString("is_contiguous");
  g_memory_format = Py_BuildValue("(s)", "memory_format");
  if (!g_dtype || !g_device || !g_shape || !g_is_contiguous || !g_memory_format) return -1;
  PyObject* type = PyType_FromSpec(&g_spec);
  if (type == nullptr) return -1;
  const int failed = PyModule_AddObjectRef(module, "CachedCall", type);
  Py_DECREF(type);
  return failed;
}
