"""`python -m ofa_jax.tokenize_images` as a file of the repository."""

from ofa_jax import tokenize_images as command
from ofa_jax.tokenize_images import main, tokenize_file

__all__ = ["main", "tokenize_file"]
__doc__ = command.__doc__  # what --help begins with

if __name__ == "__main__":
  main()
