"""Fused modules: a module's forward is read, matched with a formula, and computed by fused ops.

Terms:

- *guard*: a condition that must hold for a cached result to be valid. A guard *fails* if an
  attribute, global variable, child, hook, tensor or mode has changed.
- ``Record``: the guards on everything that a forward read, as data that refers to no module.
- ``Watch``: a record's guards bound to one module; ``unchanged`` checks all of them, in C.
- ``State``: record, watch and matched parts of a module; made again after a guard failed.
- ``CachedCall``: an operator with its *packed* arguments (weights with batch norms folded in), a
  watch, and guards on PyTorch's modes. ``run`` is a *cache hit*, or a *miss* that returns None.
- *fallback*: the module's own forward, unfused.

The modules in the order of their imports; each imports earlier ones only:

==============================  ==================================================================
``watch``                       ``Watch``: whether dictionaries, attributes and tensors changed
``guards``                      ``Record`` and ``Refusal``
``code``                        static facts about bytecode
``symbols``                     ``Symbol`` and ``Node``: the expression that a forward computes
``stand_in``, ``functions``     for reading: stand-ins of modules; the functions that a forward runs
``read``                        ``read``: follow a forward
``cached_call``                 ``CachedCall``
``graph``                       the operator for compiled graphs
``state``                       ``State``, ``Packed``, and the interfaces ``Form`` and ``Parts``
``fused``                       ``Fused``: the base class of fused modules
``program``                     several operators as one operator of the CPU
``branch``                      convolution, norm, activation
``ghost_parts``, ``ghost``      Ghost modules: parts and packed form; match and class
``gate``, ``depthwise``         squeeze-and-excitation; depthwise convolutions
``bottleneck``                  Ghost bottlenecks
``expression``                  convolutions, Ghost modules and sums as one operator of the CPU
``network``                     GhostNets
``check``, ``timing``           for ``fuse``: compare the numbers once; measure the speed
``graphed``                     CUDA graphs of whole models; imports ``watch`` and ``guards`` only
==============================  ==================================================================

The calls from ``FusedGhostModule.forward`` to the operator:

- eval, cache hit: ``forward`` -> ``CachedCall.run`` (C) -> operator;
- eval, cache miss: ``forward`` -> ``_ghost_call`` -> ``_ghost_eager`` -> ``_ghost_infer`` ->
  operator; before it ``_ghost_state`` reads the module if a guard failed, and ``_ghost_packed``
  packs the weights;
- training: ``forward`` -> ``_ghost_call`` -> ``_ghost_eager`` -> ``Ghost.run`` ->
  ``autograd.ghost.run`` -> ``GhostModuleFunction`` -> operator;
- compiled graph: ``forward`` -> ``_ghost_traced`` -> ``graph.call`` -> ``fused_inference``, and in
  the running graph ``_ghost_infer`` -> operator.
"""
