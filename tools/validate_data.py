"""`python -m ofa_jax.validate_data` as a file of the repository."""

from ofa_jax import validate_data as command
from ofa_jax.validate_data import main, validate_data

__all__ = ["main", "validate_data"]
__doc__ = command.__doc__  # what --help begins with

if __name__ == "__main__":
  main()
