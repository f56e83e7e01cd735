"""The specification in plain PyTorch: runs anywhere, reads like the paper, and is what kernels are held to."""
