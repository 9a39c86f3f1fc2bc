// ghost_ops._C.Watch: has anything changed that packed weights were made from?
#pragma once

#include <Python.h>

// Adds the type to the module. Returns 0, or -1 with a Python exception set.
int add_watch_type(PyObject* module);

bool is_watch(PyObject* object);
bool unchanged(PyObject* watch);
