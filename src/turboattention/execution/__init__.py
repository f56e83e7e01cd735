"""From checked calls to kernels: one module per backend, with `prefill` and `attend_cache` as in `reference`."""
