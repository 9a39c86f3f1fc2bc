// ghost_ops._C.Watch: detects changes of the objects that packed weights depend on.
#pragma once

#include <Python.h>

// Adds the type to the module. Returns 0, or -1 with a Python exception set.
int add_watch_type(PyObject* module);

bool is_watch(PyObject* object);
// Whether no watched object has changed. own: the dictionary for items without one, or nullptr.
bool unchanged(PyObject* watch, PyObject* own);
