"""Measurements behind every number in the README.

``python -m benchmarks`` lists the commands, one per question; ``python -m benchmarks all`` runs
them and writes one report. They need the pip extra ``bench``, training on digits ``demo``; ONNX
Runtime and OpenVINO take part where the extra ``engines`` is installed.

``questions`` holds one script per question, ``harness`` what measures, ``report`` what prints and
draws, ``gpu.py`` and ``gpu_steps`` the program that measures one GPU in eight minutes.
"""
