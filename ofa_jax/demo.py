r"""A page in the browser for one's own pictures: what an OFA says of them, what a CLIP finds.

  python -m ofa_jax.demo --model=OFA-base
  python -m ofa_jax.demo --model=ViT-B-16 --images=photos --language=zh
  python -m ofa_jax.demo --model=runs/shapes --model=runs/digits

An OFA captions, answers, finds boxes, judges, classifies, and draws where it learnt to (--codec
names the VQGAN, if its run does not); a Chinese-CLIP compares texts with a picture, shows what it
attends to, and searches the pictures of --images, whose features are computed once. The page is for
this machine alone unless --host says otherwise. It loads nothing from other places, tells nobody of
its use, and shows no file of this machine but the pictures of --images.
"""

import sys

from absl import flags

from ofa_jax import api, cli, ports
from ofa_jax.engine import log
from ofa_jax.inference.ofa import OFAModel
from ofa_jax.page import layout, library, server
from ofa_jax.page.words import LANGUAGES


def load(
  names: list[str],
  *,
  images: str | None,
  precision: str,
  codec: str | None = None,
  judge: str | None = None,
) -> layout.Models:
  """Loads the models of the page and the features of the pictures.

  Args:
    names: an OFA, a Chinese-CLIP, or one of each.
    images: folder of pictures, or None.
    precision: as for `load_from_name`.
    codec, judge: what the OFA draws with, as for `OFAModel.draw`.

  Raises:
    ValueError: several models of a family; pictures without a Chinese-CLIP; what does not suit the
      OFA to draw with.
  """
  found = {"ofa": [], "clip": []}
  for name in names:
    model, _ = api.load_from_name(name, precision=precision)
    found["ofa" if isinstance(model, OFAModel) else "clip"].append(model)
  if max(map(len, found.values())) > 1:
    raise ValueError(
      f"Expected at most one OFA and one Chinese-CLIP in --model, found {len(found['ofa'])} and "
      f"{len(found['clip'])}"
    )
  ofa, clip = (next(iter(models), None) for models in found.values())
  if images and clip is None:
    raise ValueError("Expected a Chinese-CLIP in --model to search --images with, found an OFA")
  if ofa is None and (codec or judge):
    raise ValueError("Expected an OFA in --model to draw with --codec and --judge, found none")
  draws = ofa is not None and ofa.can_draw(codec, judge)
  pictures = library.open_library(clip, images) if images else None
  drawing = {"draws": draws, "codec": codec, "judge": judge}
  return layout.Models(ofa=ofa, clip=clip, library=pictures, names=names, **drawing)


def main() -> None:
  """The command."""
  names = flags.DEFINE_multi_string(
    "model",
    None,
    "A released name, model directory, workdir, .pt or HF directory; twice: an OFA and a "
    "Chinese-CLIP.",
    required=True,
  )
  images = cli.define_path("images", "Folder of pictures to search, with a Chinese-CLIP.")
  codec = cli.define_path("codec", "VQGAN that makes pictures of the OFA's codes.")
  judge = cli.define_path("judge", "CLIP or Chinese-CLIP that chooses among the OFA's pictures.")
  port = flags.DEFINE_integer(
    "port", 7860, "Of the page; 0: any that is free.", lower_bound=0, upper_bound=65535
  )
  host = flags.DEFINE_string(
    "host", "127.0.0.1", "Address to bind to; 0.0.0.0: all who reach this machine may use it."
  )
  language = flags.DEFINE_enum("language", "en", list(LANGUAGES), "Of the page.")
  precision = cli.define_precision()

  def command():
    log.quiet_libraries()
    server.end_in_order()  # before there is anything to tidy
    words = LANGUAGES[language.value]
    with server.closed_gradio(), ports.listening(host.value, port.value) as opened:
      models = load(
        names.value,
        images=images.value,
        precision=precision.value,
        codec=codec.value,
        judge=judge.value,
      )
      local = ports.is_local(opened)
      page = layout.build(models, words=words)
      app = server.application(page, words=words, hosts=ports.LOCAL if local else ("*",))
      if not local:
        print(f"Everybody who reaches {host.value} may use the page", file=sys.stderr)
      print(f"The page is at {ports.url(opened)} (Ctrl-C ends it)")
      sys.stdout.flush()
      server.serve(app, opened)

  cli.run(command, interrupted="the page is closed")


if __name__ == "__main__":
  main()
