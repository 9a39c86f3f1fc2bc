// The checks before a fused module in eval mode calls its operator, and the call: in Python the
// dozen checks take as long as the arithmetic of a small module. Written with the C API and no
// torch header. ghost_ops/fusion/cached_call.py is the same in Python and documents the arguments.
#include "python/cached_call.h"

#include <initializer_list>

#include "python/watch.h"

namespace {

constexpr Py_ssize_t kMostArguments = 31;  // after x

struct CachedCall {
  PyObject_HEAD PyObject* watch;
  PyObject* guards;  // pairs (function, arguments); each call must return False
  PyObject *tensor_type, *dtype, *device, *channels_last, *op, *arguments;
  long long channels;
};

PyObject *g_dtype, *g_device, *g_shape, *g_is_contiguous;  // interned attribute names
PyObject* g_memory_format;                                 // the tuple ("memory_format",)

template <class F>
int for_each(CachedCall* self, F&& f) {
  for (PyObject** p : {&self->watch, &self->guards, &self->tensor_type, &self->dtype, &self->device,
                       &self->channels_last, &self->op, &self->arguments})
    if (*p != nullptr)
      if (int stop = f(*p)) return stop;
  return 0;
}

int call_clear(CachedCall* self) {
  return for_each(self, [](PyObject*& object) {
    PyObject* dropped = object;
    object = nullptr;  // before the decref: a destructor may call this function again
    Py_DECREF(dropped);
    return 0;
  });
}

int call_traverse(CachedCall* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  return for_each(self, [&](PyObject* object) { return visit(object, arg); });
}

void call_dealloc(CachedCall* self) {
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  call_clear(self);
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

PyObject* call_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
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

// Releases `object` and returns whether it is `wanted`, which another reference keeps alive. False
// for null, which means that an exception is set.
bool is(PyObject* object, PyObject* wanted) {
  Py_XDECREF(object);
  return object == wanted;
}

bool guards_hold(PyObject* guards) {
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(guards); ++k) {
    PyObject* pair = PyTuple_GET_ITEM(guards, k);
    PyObject* with = PyTuple_GET_ITEM(pair, 1);
    PyObject* result = PyObject_Vectorcall(PyTuple_GET_ITEM(pair, 0),
                                           reinterpret_cast<PyTupleObject*>(with)->ob_item,
                                           static_cast<size_t>(PyTuple_GET_SIZE(with)), nullptr);
    if (!is(result, Py_False)) return false;
  }
  return true;
}

// Whether the shape is [N, channels, H, W] without a zero. Releases it.
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
  PyObject* contiguous = PyObject_CallMethodNoArgs(x, g_is_contiguous);
  if (contiguous == nullptr) return false;
  if (is(contiguous, Py_True)) return true;
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

PyObject* call_run(CachedCall* self, PyObject* const* args, Py_ssize_t count) {
  if (count != 2) {
    PyErr_Format(PyExc_TypeError, "run takes x and a dictionary, got %zd arguments", count);
    return nullptr;
  }
  // A null watch: the garbage collector has cleared this object.
  if (self->watch == nullptr) Py_RETURN_NONE;
  // The guards and the operator may run Python that drops the last reference to this object.
  Py_INCREF(self);
  PyObject* result;
  if (may_run(self, args[0], args[1])) {
    PyObject* with[1 + kMostArguments] = {args[0]};
    const Py_ssize_t stored = PyTuple_GET_SIZE(self->arguments);
    for (Py_ssize_t k = 0; k < stored; ++k) with[1 + k] = PyTuple_GET_ITEM(self->arguments, k);
    result = PyObject_Vectorcall(self->op, with, static_cast<size_t>(stored + 1), nullptr);
  } else {
    // A check that raised counts as failed. The caller then takes the general path, which raises
    // again if there is an error to report.
    PyErr_Clear();
    result = Py_NewRef(Py_None);
  }
  Py_DECREF(self);
  return result;
}

PyMethodDef g_methods[] = {
    {"run", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)(void)>(call_run)),
     METH_FASTCALL, "The operator's result for x, or None if a check fails."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot g_slots[] = {
    {Py_tp_doc, const_cast<char*>("CachedCall(...): see ghost_ops.fusion.cached_call.")},
    {Py_tp_new, reinterpret_cast<void*>(call_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(call_dealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(call_traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(call_clear)},
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
