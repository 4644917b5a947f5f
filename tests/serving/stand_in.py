"""A Chinese-CLIP that computes nothing, for what the service does around its models."""

import contextlib
import threading
import time
import types

import numpy as np

from ofa_jax import ports
from ofa_jax.serving import app, limits
from ofa_jax.serving.models import CLIP
from ofa_jax.serving.service import Service

WIDTH = 3


def until(true, *, seconds=20.0) -> None:
  """Waits until a function says so."""
  end = time.monotonic() + seconds
  while not true():
    assert time.monotonic() < end, "waited too long"
    time.sleep(0.01)


class Model:
  """Features are the mean colours of images and the lengths of texts.

  Attributes:
    batches: rows of each call.
    go: waited for by whoever encodes the text "slow".
  """

  image_size = 8
  context_length = 52
  config = types.SimpleNamespace(embed_dim=WIDTH)

  def __init__(self):
    self.batches, self.go, self.begun = [], threading.Event(), threading.Event()

  def tokenizer(self, texts, *, context_length):
    assert context_length == self.context_length
    return list(texts)

  def encode_text(self, texts):
    self.batches.append(len(texts))
    self.begun.set()
    if "slow" in texts:
      self.go.wait(20)
    if "bad" in texts:
      raise ValueError("Expected good texts, found a bad one")
    if "fault" in texts:
      raise RuntimeError("the device is gone")
    return np.array([[len(text), 1, 2] for text in texts], np.float32)

  def encode_image(self, images):
    self.batches.append(len(images))
    return images.mean((1, 2))

  def logits(self, images, texts):
    logits = images @ texts.T
    return logits, logits.T


def service(model=None, *, most=4, wait=0.0, **bounds) -> Service:
  """A service of the stand-in that is ready."""
  served = CLIP("colours", model or Model())
  made = Service([served], limits=limits.Limits(**bounds), most=most, wait=wait)
  made.compile(now=False)
  return made


@contextlib.contextmanager
def listening(made: Service):
  """Serves on a free port of this machine; gives the port."""
  from ofa_jax.serving import server

  sock = ports.listening("127.0.0.1", 0)
  site = server.Server(app.application(made), service=made, host="127.0.0.1", port=0)
  thread = threading.Thread(target=site.run, kwargs={"sockets": [sock]}, daemon=True)
  thread.start()
  while not site.started:
    thread.join(0.01)
    assert thread.is_alive()
  try:
    yield sock.getsockname()[1]
  finally:
    made.stop()
    thread.join(30)
    made.close(within=5)
    assert not thread.is_alive()
