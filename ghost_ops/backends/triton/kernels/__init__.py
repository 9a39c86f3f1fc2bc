"""The Triton kernels, one concern a file."""
