"""`python -m ofa_jax.convert` as a file of the repository."""

from ofa_jax.convert.__main__ import convert, main

__all__ = ["convert", "main"]

if __name__ == "__main__":
  main()
