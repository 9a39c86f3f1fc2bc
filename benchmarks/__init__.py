"""Measurements behind every number in the README.

    python -m benchmarks.module   one Ghost module: time in floors, ratios, saved memory, call
    overhead python -m benchmarks.plots    pictures from a results file
    python -m benchmarks.demo     the main job: train on real digits with both modules, every shape

The first two need the extra ``bench``, the last the extra ``demo``.
"""
