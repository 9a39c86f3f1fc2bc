// ghost_ops._C.Watch: tells whether what packed weights were made from has changed.
#pragma once

#include <Python.h>

// Adds the type to the module. Returns 0, or -1 with a Python exception set.
int add_watch_type(PyObject* module);

bool is_watch(PyObject* object);
// own: the dictionary of the items without one, or nullptr.
bool unchanged(PyObject* watch, PyObject* own);
