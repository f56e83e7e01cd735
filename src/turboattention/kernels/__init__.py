"""Kernels by backend. They import only the packed format, the configuration and the errors."""
