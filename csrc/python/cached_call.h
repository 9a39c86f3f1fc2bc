// ghost_ops._C.CachedCall: calls an operator with stored arguments if all its checks pass.
#pragma once

#include <Python.h>

// Adds the type to the module. Returns 0, or -1 with a Python exception set.
int add_cached_call_type(PyObject* module);
