"""How much a client may ask for, and how a request that asks for more is refused."""

import dataclasses

from ofa_jax.data import images


class Refused(Exception):  # noqa: N818 (the client's fault, or nobody's)
  """A request that gets no answer; the text says what was expected, found, and what to do.

  Attributes:
    status: of HTTP.
    reason: one word, for the metrics.
  """

  def __init__(self, status: int, text: str, *, reason: str):
    super().__init__(text)
    self.status, self.reason = status, reason


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """What a request, and all of them together, may be.

  Attributes:
    body: bytes of a request's body.
    bodies: bytes of all bodies that are held at once; None: eight times as many as one.
    pixels: of a picture, width times height, found in its header before anything is decoded.
    images: pictures of a request.
    texts: texts of a request: questions, classes, candidates.
    letters: characters of a text.
    top_k: rows that a search tells.
    samples: pictures that are drawn for a text.
    queue: rows of all clients that may wait.
    reading: seconds in which a body must have come.
    deadline: seconds in which an answer must be ready.
  """

  body: int = 32 << 20
  bodies: int | None = None
  pixels: int = 25_000_000
  images: int = 64
  texts: int = 256
  letters: int = 512
  top_k: int = 100
  samples: int = 16
  queue: int = 512
  reading: float = 20.0
  deadline: float = 60.0

  def __post_init__(self):
    """Raises ValueError for what allows nothing, or more than can be decoded."""
    faults = [
      f"{field.name} {value}"
      for field in dataclasses.fields(self)
      if (value := getattr(self, field.name)) is not None and not value > 0  # NaN among others
    ]
    if faults:
      raise ValueError(f"Expected limits above 0, found {', '.join(faults)}")
    if self.pixels > images.MAX_PIXELS:
      raise ValueError(
        f"Expected at most {images.MAX_PIXELS:,} pixels of a picture, found {self.pixels:,}"
      )

  @property
  def held(self) -> int:
    """Bytes of all bodies together."""
    return 8 * self.body if self.bodies is None else self.bodies

  def count(self, what: str, found: int, most: int) -> None:
    """Raises Refused for more of something than a request may have."""
    if found > most:
      text = f"Expected at most {most} {what} in a request, found {found}. Send several requests."
      raise Refused(422, text, reason="count")

  def text(self, what: str, text: str) -> None:
    """Raises Refused for a text that is too long or cannot be written in UTF-8."""
    if len(text) > self.letters:
      found = f"Expected {what} of at most {self.letters} characters, found {len(text)}"
      raise Refused(422, found, reason="letters")
    try:
      text.encode()
    except UnicodeEncodeError as error:
      found = f"Expected {what} in Unicode, found half of a surrogate pair: {error.reason}"
      raise Refused(422, found, reason="text") from None
