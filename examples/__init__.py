"""Examples of ghost_ops: ``python -m examples.digits``, ``python -m examples.photograph``."""
