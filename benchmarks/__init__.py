"""Measurements behind every number in the README.

``python -m benchmarks`` lists the commands; ``all`` runs one script per question (``questions``)
and writes one report (``report``); ``harness`` measures. ``gpu.py`` and ``gpu_steps`` measure one
GPU. Needs the pip extra ``bench``; ONNX Runtime and OpenVINO take part with the extra ``engines``.
"""
