"""Measurements behind every number in the README.

``python -m benchmarks`` lists the scripts, one per question; ``python -m benchmarks all`` runs them
and writes one report. They need the pip extra ``bench``, those that train on digits ``demo``; ONNX
Runtime and OpenVINO take part where the extra ``engines`` is installed.
"""
