r"""Makes files of a model that run without ofa_jax: StableHLO for JAX, ONNX for everything else.

  python -m ofa_jax.export --model=M --output=D --format=onnx
  python -m ofa_jax.export --model=M --output=D --format=stablehlo --parts=image,text

Of a Chinese-CLIP the parts are its towers, image and text, or both as one file (--parts=both); of
an OFA its encoder and one step of its decoder, over which a search in NumPy finds captions and
answers. Every file takes any number of rows. StableHLO is one program for CPUs, GPUs and TPUs.

D holds, beside the files, the tokenizer, the constants that pictures are prepared with
(config.json), and exported.py, which runs all of it with NumPy and ONNX Runtime or JAX alone:
D/README.md has ten lines that do so. The export is compared with the model on random inputs of 1, 3
and 8 rows, and D appears only if they agree. ONNX needs the extra: pip install -e ".[export]".
"""

import logging
import time

import jax
from absl import flags

from ofa_jax import cli, hub
from ofa_jax.engine import log
from ofa_jax.exporting import folder
from ofa_jax.exporting.parts import BATCHES, DTYPES


def main() -> None:
  """The command."""
  name = cli.define_path(
    "model", "A released name, model directory, workdir, .pt or HF directory.", required=True
  )
  output = cli.define_path("output", "A new folder.", required=True)
  form = flags.DEFINE_enum("format", None, tuple(folder.FORMATS), "Of the files.", required=True)
  parts = flags.DEFINE_list(
    "parts",
    None,
    "Of a Chinese-CLIP image, text (default: these two) and both, one file of the two; of an OFA "
    "encoder and decoder (default: both).",
  )
  dtype = flags.DEFINE_enum(
    "dtype", "fp32", DTYPES, "Of weights and arithmetic; norms and softmax stay in fp32."
  )
  weights = flags.DEFINE_enum(
    "weights",
    None,
    ("inside", "beside"),
    "Where they are; default: beside StableHLO, inside ONNX below 1.9 GB.",
  )
  context_length = flags.DEFINE_integer(
    "context-length",
    None,
    "Tokens of a text; default: a Chinese-CLIP's own, of an OFA's prompts 64.",
    lower_bound=2,
  )
  image_size = flags.DEFINE_integer(
    "image-size", None, "Side of an OFA's pictures in pixels; default: its own.", lower_bound=16
  )
  max_length = flags.DEFINE_integer(
    "max-length", None, "Positions of an OFA's decoder; default: 64.", lower_bound=2
  )
  tolerance = flags.DEFINE_float(
    "tolerance",
    None,
    "Largest difference from the model in fp32, as a share of an output's largest number; default: "
    "1e-5, in fp16 2e-2.",
    lower_bound=0,
  )
  tokenizer = cli.define_path(
    "tokenizer", "Folder of the tokenizer's files, instead of those beside the model."
  )
  cli.define_stage()

  def command():
    log.quiet_libraries()
    logging.getLogger().setLevel(logging.WARNING)  # jax2onnx tells what it does by the root logger
    folder.check_packages(form.value)
    # Files are made, and compared, on the CPU: what they hold does not depend on the machine.
    jax.config.update("jax_platforms", "cpu")
    with cli.sole_writer(output.value, inputs=(name.value,), new=True):
      begun = time.monotonic()
      source = hub.open_model(name.value).with_tokenizer(tokenizer.value)
      written = folder.write(
        source,
        output.value,
        form=form.value,
        names=parts.value,
        dtype=dtype.value,
        inside=None if weights.value is None else weights.value == "inside",
        context_length=context_length.value,
        image_size=image_size.value,
        max_length=max_length.value,
        tolerance=tolerance.value,
        say=print,
      )
    rows = ", ".join(map(str, BATCHES))
    for part in written:
      print(
        f"{part.name}: {part.bytes / 1e6:,.1f} MB, within {part.difference:.1e} of the model's "
        f"largest output, at {rows} rows"
      )
    print(f"{output.value} is whole after {time.monotonic() - begun:.0f} s; see its README.md")

  cli.run(command)


if __name__ == "__main__":
  main()
