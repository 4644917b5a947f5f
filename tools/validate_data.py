"""`python -m ofa_jax.validate_data` as a file of the repository."""

from ofa_jax.validate_data import main, validate_data

__all__ = ["main", "validate_data"]

if __name__ == "__main__":
  main()
