"""From checked calls to kernels: one module a backend, with `prefill` and `attend_cache` as the reference has them."""
