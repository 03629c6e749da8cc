"""Triton kernels of ddit_rt. One file per fused kernel: kernel, launcher and plain PyTorch reference side by side.

Users import :mod:`ddit_rt.ops`, which validates arguments and picks a backend; nothing here validates twice.
"""
