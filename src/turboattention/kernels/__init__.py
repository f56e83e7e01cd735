"""Kernels by backend. Each knows the packed format, the configuration and the errors, and nothing else."""
