"""The specification in plain PyTorch, against which all kernels are tested."""
