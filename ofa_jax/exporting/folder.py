"""The folder of an export: the files of the model, and what runs them without ofa_jax."""

import importlib.util
import json
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

import ofa_jax
from ofa_jax import hub, numerics, tokenizers
from ofa_jax.exporting import beside, clip, ofa, onnx_files, readme, stablehlo
from ofa_jax.exporting.beside import exported
from ofa_jax.exporting.parts import TOLERANCES, Part, check
from ofa_jax.files import written_whole

FORMATS = {"stablehlo": stablehlo, "onnx": onnx_files}
FORMAT = 1  # of config.json
# Lines of our modules that are others where the modules stand alone.
_ALONE = {
  "from ofa_jax import staging\n": "",
  "staging.local_folder(directory, below=False)": "pathlib.Path(directory)",
  "from ofa_jax.tokenizers.": "from .",
}
_OPENS = {
  "cnclip": "from .bert import ChineseBertTokenizer\n\n\ndef open_tokenizer(folder):\n"
  '  return ChineseBertTokenizer(folder / "vocab.txt")\n',
  "ofa": "from .ofa import OFATokenizer\n\nopen_tokenizer = OFATokenizer.from_directory\n",
}
_MODULES = {"cnclip": ("bert",), "ofa": ("bert", "ofa", "special")}


class Written(NamedTuple):
  """A part that was written.

  Attributes:
    name: of the part.
    bytes: of its files; those of weights that parts share count for each.
    difference: the largest from the model, as a share of the outputs' largest number.
  """

  name: str
  bytes: int
  difference: float


def write(
  source: hub.Source,
  path: str | pathlib.Path,
  *,
  form: str,
  names: list[str] | None = None,
  dtype: str = "fp32",
  inside: bool | None = None,
  context_length: int | None = None,
  image_size: int | None = None,
  max_length: int | None = None,
  tolerance: float | None = None,
  say: Callable[[str], None] = lambda line: None,
) -> list[Written]:
  """Exports a model to a new folder, which appears when all of it was compared with the model.

  Args:
    source: the model.
    path: the new folder.
    form: out of `FORMATS`.
    names: the parts, see `clip.PARTS` and `ofa.PARTS`; None: the usual ones.
    dtype: "fp32" or "fp16", of weights and arithmetic.
    inside: whether the weights are inside the files; None: as is usual for the format.
    context_length: tokens of a text; None: a Chinese-CLIP's own, of an OFA 64.
    image_size, max_length: of an OFA, see `ofa.Sizes`; None: its own size, 64 positions.
    tolerance: the largest difference from the model that is allowed, as a share of an output's
      largest number; None: as in `TOLERANCES`.
    say: takes a line on each thing that is done.

  Raises:
    ValueError: options that do not fit the model, something is there already, or the export is not
      the model within the tolerance.
  """
  parts, described = _parts(
    source,
    names,
    dtype="fp32" if form == "onnx" else dtype,
    context_length=context_length,
    image_size=image_size,
    max_length=max_length,
  )
  with written_whole(path) as made, jax.default_matmul_precision(numerics.matmul_precision(dtype)):
    made.mkdir()
    begun = time.monotonic()
    files = FORMATS[form].write(parts, made, dtype=dtype, inside=inside)
    say(f"Written in {time.monotonic() - begun:.1f} s; comparing with the model")
    _write_tokenizer(source, made)
    config = {
      "format": form,
      "version": FORMAT,
      "family": source.family.name,
      "dtype": dtype,
      **described,
      "parts": files,
      "made_by": f"ofa_jax {ofa_jax.__version__}, jax {jax.__version__}",
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (made / "config.json").write_text(text, encoding="utf-8")
    _copy("exported", made / "exported.py")
    _copy(f"runtime_{form}", made / "runtime.py")
    if source.family.name == "ofa":
      _copy("search", made / "search.py")
    (made / "README.md").write_text(readme.text(config, list(files)), encoding="utf-8")
    options = {"providers": ["CPUExecutionProvider"]} if form == "onnx" else {}
    model = exported.Model(made, **options)
    written = [
      Written(
        part.name,
        sum((made / name).stat().st_size for name in files[part.name]["files"]),
        check(part, model.parts[part.name], tolerance=tolerance or TOLERANCES[dtype]),
      )
      for part in parts
    ]
  return written


def missing(form: str) -> list[str]:
  """The packages that a format needs and this environment has not."""
  return [name for name in FORMATS[form].NEEDED if importlib.util.find_spec(name) is None]


def check_packages(form: str) -> None:
  """Raises ValueError where there are some."""
  absent = missing(form)
  if absent:
    raise ValueError(
      f'Expected the packages of the extra "export" for --format={form}, found no '
      f'{", ".join(absent)}; pip install -e ".[export]"'
    )


def _parts(
  source: hub.Source, names: list[str] | None, *, dtype: str, **lengths: int | None
) -> tuple[list[Part], dict[str, Any]]:
  """The parts of a model, and what `config.json` says of it beside its files."""
  if source.family.name == "cnclip":
    faults = [f"--{k.replace('_', '-')}" for k in ("image_size", "max_length") if lengths[k]]
    if faults:
      raise ValueError(f"Expected an OFA with {', '.join(faults)}, found a Chinese-CLIP")
    return clip.parts(source, names, dtype=dtype, context_length=lengths["context_length"])
  if source.family.name != "ofa":
    raise ValueError(f"Expected a Chinese-CLIP or an OFA, found {source.family.title}")
  return ofa.parts(source, names, dtype=dtype, lengths=ofa.sizes(source, **lengths))


def _write_tokenizer(source: hub.Source, folder: pathlib.Path) -> None:
  """The tokenizer's files, and our own modules that read them, as a package of their own."""
  place = folder / "tokenizer"
  place.mkdir()
  source.family.tokenizers.save(source.files, place, source.config)
  ours = pathlib.Path(tokenizers.__path__[0])
  for name in _MODULES[source.family.name]:
    code = (ours / f"{name}.py").read_text(encoding="utf-8")
    for line, alone in _ALONE.items():
      code = code.replace(line, alone)
    (place / f"{name}.py").write_text(code, encoding="utf-8")
  (place / "__init__.py").write_text(_OPENS[source.family.name], encoding="utf-8")


def _copy(module: str, path: pathlib.Path) -> None:
  shutil.copyfile(pathlib.Path(beside.__path__[0]) / f"{module}.py", path)
