"""Fused modules: what ``fuse`` makes of Ghost modules, bottlenecks and networks.

``read`` follows a module's forward and records all that it read; ``guards`` tell whether a module
still is as it was read; ``fused`` is the part that all fused modules share; ``ghost``,
``bottleneck``, ``expression`` and ``network`` match what was read and compute it; ``check``
compares the numbers once, ``timing`` the speed.
"""
