"""Every test sees eight CPU devices, so that meshes are tested wherever the tests run."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_num_cpu_devices", 8)
