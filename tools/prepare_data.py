"""`python -m ofa_jax.prepare_data` as a file of the repository."""

from ofa_jax import prepare_data as command
from ofa_jax.prepare_data import main, prepare_data

__all__ = ["main", "prepare_data"]
__doc__ = command.__doc__  # what --help begins with

if __name__ == "__main__":
  main()
