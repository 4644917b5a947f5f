"""OFA's positions (arXiv:2202.03052, section 3.1): they bias attention and are in no state.

Two biases are added to the logits. The absolute one is a product of position queries and keys, the
same in all layers. The relative one is a table per layer, looked up by a bucket of the distance: of
tokens along the text, of cells on a grid for images and for image codes. Between text and image
there is none.

Images number their cells on a grid of a fixed width, `image_bucket_size`: cell (r, c) has the id
`r * image_bucket_size + c + 1`, whatever the width of the image; 0 is the start of a code sequence.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import Initializer

from ofa_jax.models.layers import Embed, LayerNorm

EPS = 1e-5  # torch.nn.LayerNorm's default
MAX_TOKENS = 1024  # texts that the token buckets are made for
TEXT_ROWS = MAX_TOKENS + 2  # of the table of text positions; the last two are never read
AFTER_CODES = 1024  # id of every position behind the codes of an image


class Positions(nnx.Module):
  """Vectors of text positions and image cells, each normalised by a norm of its own."""

  def __init__(self, width: int, cells: int, *, init: Initializer, rngs: nnx.Rngs):
    """Makes text [1026, D] and image [cells + 1, D], whose row 0 starts a code sequence."""
    self.text = Embed(TEXT_ROWS, width, init=init, rngs=rngs)
    self.text_norm = LayerNorm(width, eps=EPS)
    self.image = Embed(cells + 1, width, init=init, rngs=rngs)
    self.image_norm = LayerNorm(width, eps=EPS)


class RelativeBias(nnx.Module):
  """A layer's learnt biases by distance: of tokens, and of the cells of an image."""

  def __init__(
    self, heads: int, *, token_size: int, image_size: int, init: Initializer, rngs: nnx.Rngs
  ):
    """Makes token [2 * size - 1, H], and image [(2 * size - 1)^2 + 3, H] for a grid of that width.

    The image's last three rows are for the start of a code sequence.

    Args:
      heads: H.
      token_size: buckets of distances between tokens.
      image_size: width of the grid that numbers image cells.
      init: of both tables.
      rngs: the stream `params` draws them.
    """
    self.token_size, self.image_size = token_size, image_size
    self.token = Embed(2 * token_size - 1, heads, init=init, rngs=rngs)
    self.image = Embed((2 * image_size - 1) ** 2 + 3, heads, init=init, rngs=rngs)

  def text(self, length: int) -> jax.Array:
    """Returns the bias [H, T, T] between the first T tokens."""
    distances = np.arange(1 - length, length)
    table = self.token.embedding[...][token_buckets(distances, self.token_size)]
    return _toeplitz(table.T, axis=1)

  def grid(self, height: int, width: int) -> jax.Array:
    """Returns the bias [H, I, I] between all cells of an image, row by row.

    The same as `cells` of all of them, by slices instead of a look-up of I * I rows, whose gradient
    would be as many additions into the table.
    """
    size = self.image_size
    table = self.image.embedding[...]
    table = table[: (2 * size - 1) ** 2].reshape(2 * size - 1, 2 * size - 1, -1)
    table = table[size - height : size + height - 1, size - width : size + width - 1]
    x = _toeplitz(_toeplitz(table.transpose(2, 0, 1), axis=1), axis=3)  # [H, h, h, w, w]
    return x.transpose(0, 1, 3, 2, 4).reshape(x.shape[0], height * width, height * width)

  def cells(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Returns the bias [..., H, T, S] of cells by id, int32[..., T] and int32[..., S]."""
    bias = self.image(image_buckets(queries, keys, self.image_size))
    return jnp.moveaxis(bias, -1, -3)

  def codes(self, length: int, window: int) -> jax.Array:
    """Returns the bias [H, T, T] between the first T positions of a sequence of image codes.

    Args:
      length: T, the start and the codes.
      window: side of the square of codes that make an image.
    """
    if length > window**2 + 1:
      ids = code_cells(length, window, self.image_size)
      return self.cells(ids, ids)
    rows = max(1, -(-(length - 1) // window))
    codes = self.grid(rows, window)[:, : length - 1, : length - 1]
    row, column, corner = self.image.embedding[...][-3:]  # of the start: as query, as key, as both
    x = jnp.pad(codes, ((0, 0), (1, 0), (1, 0)))
    first = jnp.arange(length) == 0
    x = jnp.where(first, column[:, None, None], x)
    x = jnp.where(first[:, None], row[:, None, None], x)
    return jnp.where(first & first[:, None], corner[:, None, None], x)

  def text_step(self, position: jax.Array, length: int) -> jax.Array:
    """Returns row `position` of `text(length)`, [H, T]."""
    buckets = token_buckets(np.arange(1 - length, length), self.token_size)
    row = jax.lax.dynamic_slice(
      jnp.asarray(buckets[::-1].copy()), (length - 1 - position,), (length,)
    )
    return self.token(row).T

  def codes_step(self, position: jax.Array, length: int, window: int) -> jax.Array:
    """Returns row `position` of `codes(length, window)`, [H, T]."""
    ids = jnp.asarray(code_cells(length, window, self.image_size))
    return self.cells(jax.lax.dynamic_slice(ids, (position,), (1,)), ids)[:, 0]


def token_buckets(distances: np.ndarray, size: int) -> np.ndarray:
  """Row of the token table for distances query - key: exact when near, by logarithm when far.

  Args:
    distances: int[N]; from 1023 on all are the same.
    size: buckets; half of them are exact on either side.
  """
  distances = np.clip(distances, 1 - MAX_TOKENS, MAX_TOKENS - 1)
  near = size // 2
  far = np.where(np.abs(distances) < near, near - 1, np.abs(distances))
  far = np.log(far / near) / math.log((MAX_TOKENS - 1) / near) * (near - 1)
  far = np.ceil(far).astype(np.int32) + near
  buckets = np.where(np.abs(distances) <= near, distances, np.sign(distances) * far)
  return (buckets + size - 1).astype(np.int32)


def image_buckets(queries: jax.Array, keys: jax.Array, size: int) -> jax.Array:
  """Row of the image table, int32[..., T, S], for cells by id; `size` is the width of the grid."""
  q, k = jnp.asarray(queries)[..., :, None], jnp.asarray(keys)[..., None, :]
  side, rows = 2 * size - 1, (2 * size - 1) ** 2
  down = (q - 1) // size - (k - 1) // size + size - 1
  right = (q - 1) % size - (k - 1) % size + size - 1
  buckets = down * side + right
  buckets = jnp.where(q == 0, rows, buckets)
  buckets = jnp.where(k == 0, rows + 1, buckets)
  return jnp.where((q == 0) & (k == 0), rows + 2, buckets)


def grid_cells(height: int, width: int, size: int) -> np.ndarray:
  """Ids int32[height * width] of the cells of an image, row by row; `size`: width of the grid."""
  return (np.arange(height)[:, None] * size + np.arange(width) + 1).ravel().astype(np.int32)


def code_cells(length: int, window: int, size: int) -> np.ndarray:
  """Ids int32[length] of a sequence of image codes: its start, a window's cells, a filler.

  The filler is the original's where the table has it. A smaller one has another: beside longer
  texts of a batch, what is there is masked, and has to be finite for the gradient.
  """
  ids = np.full(max(length, window**2 + 1), min(AFTER_CODES, size**2), np.int32)
  ids[0] = 0
  ids[1 : window**2 + 1] = grid_cells(window, window, size)
  return ids[:length]


def _toeplitz(x: jax.Array, *, axis: int) -> jax.Array:
  """Spreads an axis of 2 * n - 1 distances into n queries and n keys: y[i, j] = x[i - j + n - 1].

  Repeating rows of 2 * n and reading rows of 2 * n - 1 shifts each by one.
  """
  x = jnp.moveaxis(x, axis, -1)
  n = (x.shape[-1] + 1) // 2
  x = jnp.pad(x[..., ::-1], [(0, 0)] * (x.ndim - 1) + [(0, 1)])
  x = jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], n, 2 * n))
  x = x.reshape(*x.shape[:-2], 2 * n * n)[..., : n * (2 * n - 1)]
  x = x.reshape(*x.shape[:-1], n, 2 * n - 1)[..., n - 1 :]
  return jnp.moveaxis(x, (-2, -1), (axis, axis + 1))
