"""Kernels for NVIDIA GPUs: importing this package registers their rows, best first."""
