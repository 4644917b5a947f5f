"""What pyproject.toml cannot say: the recipes in configs/ are the package `ofa_jax.configs`."""

import setuptools

setuptools.setup(
  packages=[*setuptools.find_packages(include=["ofa_jax*"]), "ofa_jax.configs"],
  package_dir={"ofa_jax.configs": "configs"},
)
