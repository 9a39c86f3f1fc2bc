"""Examples of ghost_ops, such as ``python -m examples.demo`` and ``python -m examples.digits``."""
