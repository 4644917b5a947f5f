"""The service behind `python -m ofa_jax.serve`: batches for many clients, limits, HTTP."""
