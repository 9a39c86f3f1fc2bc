"""Autograd functions over the operators: the Ghost module, its tail and the layers between them."""
