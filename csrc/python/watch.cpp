// Before every call of a fused module in eval mode, Watch compares the parameters, buffers,
// children, hooks and settings of the module with those that its packed weights depend on: about
// twelve tensors, fifty dictionaries and as many attributes. In Python that takes longer than the
// arithmetic of a small module. Written with the C API and no torch header.
// ghost_ops/fusion/watch.py is the same in Python and documents the arguments.
#include "python/watch.h"

#include <new>
#include <vector>

namespace {

struct Dict {
  PyObject* dict;
  std::vector<PyObject*> content;  // key, value, key, value, ... in the dictionary's order
};

struct Item {
  // dict nullptr: the argument of unchanged(). value nullptr: the key must be absent.
  PyObject *dict, *key, *value;
};

struct Attribute {
  PyObject *object, *name, *value;  // value nullptr: the object must not have it
};

struct WatchedTensor {
  PyObject* tensor;
  long long version, address;
};

struct Contents {
  std::vector<Dict> dicts;
  std::vector<Item> items;
  std::vector<WatchedTensor> tensors;
  std::vector<Attribute> attributes;

  template <class F>
  int for_each(F&& f) {
    for (Dict& d : dicts) {
      if (int stop = f(d.dict)) return stop;
      for (PyObject*& object : d.content)
        if (int stop = f(object)) return stop;
    }
    for (Item& i : items)
      for (PyObject** p : {&i.dict, &i.key, &i.value})
        if (*p != nullptr)
          if (int stop = f(*p)) return stop;
    for (WatchedTensor& t : tensors)
      if (int stop = f(t.tensor)) return stop;
    for (Attribute& a : attributes)
      for (PyObject** p : {&a.object, &a.name, &a.value})
        if (*p != nullptr)
          if (int stop = f(*p)) return stop;
    return 0;
  }
};

struct Watch {
  PyObject_HEAD Contents* contents;
};

PyTypeObject* g_type = nullptr;  // Watch
// Interned attribute names.
PyObject* g_version = nullptr;
PyObject* g_data_ptr = nullptr;
PyObject* g_class = nullptr;

// The descriptors of _version and data_ptr of torch's tensors. A direct call of one takes a third
// of the time of a lookup and call. Null if the attribute is not a descriptor of the expected type.
PyGetSetDescrObject* g_version_of = nullptr;
PyMethodDescrObject* g_data_ptr_of = nullptr;

void find_descriptors(PyTypeObject* tensor_type) {
  PyObject* version = PyObject_GetAttr(reinterpret_cast<PyObject*>(tensor_type), g_version);
  if (version != nullptr && Py_IS_TYPE(version, &PyGetSetDescr_Type) && g_version_of == nullptr)
    g_version_of = reinterpret_cast<PyGetSetDescrObject*>(Py_NewRef(version));
  PyObject* data_ptr = PyObject_GetAttr(reinterpret_cast<PyObject*>(tensor_type), g_data_ptr);
  if (data_ptr != nullptr && Py_IS_TYPE(data_ptr, &PyMethodDescr_Type) &&
      reinterpret_cast<PyMethodDescrObject*>(data_ptr)->d_method->ml_flags == METH_NOARGS &&
      g_data_ptr_of == nullptr)
    g_data_ptr_of = reinterpret_cast<PyMethodDescrObject*>(Py_NewRef(data_ptr));
  Py_XDECREF(version);
  Py_XDECREF(data_ptr);
  PyErr_Clear();
}

// Stores the integer in *out and releases `number`. Returns false, with a Python exception set, if
// there is no integer.
bool take_integer(PyObject* number, long long* out) {
  if (number == nullptr) return false;
  // Addresses can have the top bit set; comparing their bits is enough.
  *out = static_cast<long long>(PyLong_AsUnsignedLongLongMask(number));
  Py_DECREF(number);
  return !(*out == -1 && PyErr_Occurred());
}

bool read_tensor(PyObject* tensor, long long* version, long long* address) {
  const auto* v = g_version_of;
  const auto* a = g_data_ptr_of;
  PyObject* number = v != nullptr && PyObject_TypeCheck(tensor, PyDescr_TYPE(v))
                         ? v->d_getset->get(tensor, v->d_getset->closure)
                         : PyObject_GetAttr(tensor, g_version);
  if (!take_integer(number, version)) return false;
  number = a != nullptr && PyObject_TypeCheck(tensor, PyDescr_TYPE(a))
               ? a->d_method->ml_meth(tensor, nullptr)
               : PyObject_CallMethodNoArgs(tensor, g_data_ptr);
  return take_integer(number, address);
}

bool is_dict(PyObject* object, const char* what) {
  if (PyDict_Check(object)) return true;
  PyErr_Format(PyExc_TypeError, "Watch: %s must be dictionaries, got %s", what,
               Py_TYPE(object)->tp_name);
  return false;
}

bool add_dicts(Contents& to, PyObject* dicts) {
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(dicts); ++k) {
    PyObject* dict = PyTuple_GET_ITEM(dicts, k);
    if (!is_dict(dict, "dicts")) return false;
    Dict entry{Py_NewRef(dict), {}};
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value);) {
      entry.content.push_back(Py_NewRef(key));
      entry.content.push_back(Py_NewRef(value));
    }
    to.dicts.push_back(std::move(entry));
  }
  return true;
}

bool is_pair(PyObject* pair, const char* what) {
  if (PyTuple_Check(pair) && PyTuple_GET_SIZE(pair) == 2) return true;
  PyErr_Format(PyExc_TypeError, "Watch: %s", what);
  return false;
}

bool add_items(Contents& to, PyObject* items, bool absent, PyObject* own) {
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(items); ++k) {
    PyObject* item = PyTuple_GET_ITEM(items, k);
    if (!is_pair(item, "items and absent must be pairs (dictionary, key)")) return false;
    const bool of_own = PyTuple_GET_ITEM(item, 0) == Py_None && own != Py_None;
    PyObject* dict = of_own ? own : PyTuple_GET_ITEM(item, 0);
    PyObject* key = PyTuple_GET_ITEM(item, 1);
    if (!is_dict(dict, "those of items and absent")) return false;
    PyObject* value = PyDict_GetItemWithError(dict, key);
    if (value == nullptr && PyErr_Occurred()) return false;
    if ((value == nullptr) != absent) {
      PyErr_SetObject(PyExc_KeyError, key);
      return false;
    }
    to.items.push_back({of_own ? nullptr : Py_NewRef(dict), Py_NewRef(key), Py_XNewRef(value)});
  }
  return true;
}

bool add_tensors(Contents& to, PyObject* tensors) {
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(tensors); ++k) {
    PyObject* tensor = PyTuple_GET_ITEM(tensors, k);
    if (g_version_of == nullptr || g_data_ptr_of == nullptr) find_descriptors(Py_TYPE(tensor));
    long long version, address;
    if (!read_tensor(tensor, &version, &address)) return false;
    to.tensors.push_back({Py_NewRef(tensor), version, address});
  }
  return true;
}

// A new reference to an attribute, or nullptr without an exception if there is none.
PyObject* attribute(PyObject* object, PyObject* name) {
  PyObject* value = PyObject_GetAttr(object, name);
  if (value == nullptr) PyErr_Clear();
  return value;
}

bool add_attributes(Contents& to, PyObject* attributes) {
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(attributes); ++k) {
    PyObject* pair = PyTuple_GET_ITEM(attributes, k);
    if (!is_pair(pair, "attributes must be pairs (object, name)")) return false;
    PyObject *object = PyTuple_GET_ITEM(pair, 0), *name = PyTuple_GET_ITEM(pair, 1);
    if (!PyUnicode_Check(name)) {
      PyErr_SetString(PyExc_TypeError, "Watch: names of attributes must be strings");
      return false;
    }
    Py_INCREF(name);
    PyUnicode_InternInPlace(&name);
    to.attributes.push_back({Py_NewRef(object), name, attribute(object, name)});
  }
  return true;
}

int watch_clear(Watch* self) {
  if (self->contents != nullptr) {
    Contents* contents = self->contents;
    self->contents = nullptr;  // before the decrefs: a destructor may call this function again
    contents->for_each([](PyObject* object) {
      Py_DECREF(object);
      return 0;
    });
    delete contents;
  }
  return 0;
}

PyObject* watch_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  static const char* kNames[] = {"dicts",      "items", "absent", "tensors",
                                 "attributes", "own",   nullptr};
  PyObject *dicts, *items, *absent, *tensors, *attributes, *own;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!O!O!O!O!O:Watch", const_cast<char**>(kNames),
                                   &PyTuple_Type, &dicts, &PyTuple_Type, &items, &PyTuple_Type,
                                   &absent, &PyTuple_Type, &tensors, &PyTuple_Type, &attributes,
                                   &own))
    return nullptr;
  Watch* self = reinterpret_cast<Watch*>(type->tp_alloc(type, 0));
  if (self == nullptr) return nullptr;
  self->contents = new (std::nothrow) Contents;
  if (self->contents == nullptr) {
    Py_DECREF(self);
    return PyErr_NoMemory();
  }
  Contents& to = *self->contents;
  if (!add_dicts(to, dicts) || !add_items(to, items, false, own) ||
      !add_items(to, absent, true, own) || !add_tensors(to, tensors) ||
      !add_attributes(to, attributes)) {
    Py_DECREF(self);
    return nullptr;
  }
  return reinterpret_cast<PyObject*>(self);
}

int watch_traverse(Watch* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  if (self->contents == nullptr) return 0;
  return self->contents->for_each([&](PyObject* object) { return visit(object, arg); });
}

void watch_dealloc(Watch* self) {
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  watch_clear(self);
  type->tp_free(self);
  Py_DECREF(type);
}

// Whether both are one object, or equal and of one type: 8 channels are not 8.0 channels.
bool same(PyObject* value, PyObject* wanted) {
  if (value == wanted) return true;
  if (value == nullptr || wanted == nullptr || Py_TYPE(value) != Py_TYPE(wanted)) return false;
  if (PyTuple_CheckExact(value)) {
    if (PyTuple_GET_SIZE(value) != PyTuple_GET_SIZE(wanted)) return false;
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(value); ++k)
      if (!same(PyTuple_GET_ITEM(value, k), PyTuple_GET_ITEM(wanted, k))) return false;
    return true;
  }
  Py_INCREF(value);
  const int equal = PyObject_RichCompareBool(value, wanted, Py_EQ);
  Py_DECREF(value);
  return equal == 1;
}

bool holds(const Dict& entry) {
  if (PyDict_GET_SIZE(entry.dict) * 2 != static_cast<Py_ssize_t>(entry.content.size()))
    return false;
  if (entry.content.empty()) return true;
  PyObject *key, *value;
  size_t k = 0;
  for (Py_ssize_t at = 0; PyDict_Next(entry.dict, &at, &key, &value); k += 2)
    if (k >= entry.content.size() || value != entry.content[k + 1] || !same(key, entry.content[k]))
      return false;
  return true;
}

bool holds(const Item& item, PyObject* own) {
  PyObject* dict = item.dict != nullptr ? item.dict : own;
  if (dict == nullptr) return false;
  PyObject* value = PyDict_GetItemWithError(dict, item.key);
  return !(value == nullptr && PyErr_Occurred()) && same(value, item.value);
}

bool holds(const Attribute& entry) {
  // Usually `object.__class__` is the type, which needs no call. A proxy may return another class.
  if (entry.name == g_class && reinterpret_cast<PyObject*>(Py_TYPE(entry.object)) == entry.value)
    return true;
  PyObject* value = attribute(entry.object, entry.name);
  const bool good = same(value, entry.value);
  Py_XDECREF(value);
  return good;
}

bool holds(const WatchedTensor& entry) {
  long long version, address;
  return read_tensor(entry.tensor, &version, &address) && version == entry.version &&
         address == entry.address;
}

bool all_hold(Watch* self, PyObject* own) {
  const auto all = [](const auto& entries) {
    for (const auto& entry : entries)
      if (!holds(entry)) return false;
    return true;
  };
  // Comparing values can run Python, and that could drop the last reference to this object.
  Py_INCREF(self);
  const Contents* c = self->contents;
  const auto items_hold = [own](const std::vector<Item>& items) {
    for (const Item& item : items)
      if (!holds(item, own)) return false;
    return true;
  };
  const bool unchanged = c != nullptr && items_hold(c->items) && all(c->dicts) && all(c->tensors) &&
                         all(c->attributes);
  Py_DECREF(self);
  // A value that cannot be read counts as changed.
  if (!unchanged) PyErr_Clear();
  return unchanged;
}

PyObject* watch_unchanged(Watch* self, PyObject* const* args, Py_ssize_t count) {
  PyObject* own = count == 1 && args[0] != Py_None ? args[0] : nullptr;
  if (count > 1 || (own != nullptr && !PyDict_Check(own))) {
    PyErr_SetString(PyExc_TypeError, "unchanged takes nothing, or one dictionary");
    return nullptr;
  }
  return PyBool_FromLong(all_hold(self, own));
}

PyMethodDef g_methods[] = {
    {"unchanged", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)(void)>(watch_unchanged)),
     METH_FASTCALL, "Whether no watched object has changed since construction."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot g_slots[] = {
    {Py_tp_doc, const_cast<char*>("Watch(dicts, items, absent, tensors, attributes, own): see "
                                  "ghost_ops.fusion.watch.")},
    {Py_tp_new, reinterpret_cast<void*>(watch_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(watch_dealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(watch_traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(watch_clear)},
    {Py_tp_methods, g_methods},
    {0, nullptr},
};

PyType_Spec g_spec = {"ghost_ops._C.Watch", sizeof(Watch), 0,
                      Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, g_slots};

}  // namespace

int add_watch_type(PyObject* module) {
  g_version = PyUnicode_InternFromString("_version");
  g_data_ptr = PyUnicode_InternFromString("data_ptr");
  g_class = PyUnicode_InternFromString("__class__");
  if (g_version == nullptr || g_data_ptr == nullptr || g_class == nullptr) return -1;
  PyObject* type = PyType_FromSpec(&g_spec);
  if (type == nullptr) return -1;
  g_type = reinterpret_cast<PyTypeObject*>(type);  // never released
  return PyModule_AddObjectRef(module, "Watch", type);
}

bool is_watch(PyObject* object) {
  return PyObject_TypeCheck(object, g_type);
}

bool unchanged(PyObject* watch, PyObject* own) {
  return all_hold(reinterpret_cast<Watch*>(watch), own);
}
