"""What tells the numbers of a loaded model from those of another."""

from collections.abc import Sequence
from typing import Any

import jax

import ofa_jax
from ofa_jax import hub, partial
from ofa_jax.tokenizers.ofa import LAYOUTS

_TOKENIZERS = sorted({name for names in LAYOUTS.values() for name in names})


def identity(sources: Sequence[hub.Source], **options: str | int) -> dict[str, Any]:
  """All that what a model gives depends on, besides its inputs, as JSON.

  Args:
    sources: the models, of which files are looked at: before they are loaded.
    options: what it is loaded with.
  """
  folders = [source.files for source in sources if source.files is not None]
  devices = jax.local_devices()
  return {
    "model": [partial.fingerprint(source.stored()) for source in sources],
    "tokenizer": partial.fingerprint(folder / name for folder in folders for name in _TOKENIZERS),
    "devices": f"{len(devices)} x {devices[0].device_kind}",
    "version": f"ofa_jax {ofa_jax.__version__}, jax {jax.__version__}",
    **options,
  }
