r"""Models as a service: features, similarities, captions, answers, boxes and labels over HTTP.

  python -m ofa_jax.serve --model=ViT-B-16 --image-feats=F.img_feat.jsonl
  curl -F images=@a.jpg -F texts=杰尼龟 -F texts=皮卡丘 http://127.0.0.1:8000/v1/similarity

One --model or several: a Chinese-CLIP encodes, compares and searches in files of features, an OFA
answers. What rows of many clients ask for at once is computed in one batch. Pictures are uploads,
never fetched from an address or a path. http://127.0.0.1:8000/docs lists what may be asked for; it
listens on this machine only, unless --host says otherwise, and knows no passwords.

SIGTERM or Ctrl-C: what is running is finished, new requests are refused, and the status is 0.
"""

import contextlib
import logging
import threading
import warnings

from absl import flags

from ofa_jax import api, cli, cli_parsers, ports
from ofa_jax.engine import log, processes

EXTRA = 'pip install -e ".[serve]"'


def main() -> None:
  """The command."""
  places = flags.DEFINE_multi_string(
    "model",
    None,
    "A released name, model directory, workdir, .pt or HF directory; may be given several times. "
    "Clients call it by the last part of its place.",
    required=True,
  )
  host = flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; 0.0.0.0: every one.")
  port = flags.DEFINE_integer(
    "port", 8000, "Port to listen at; 0: any that is free.", lower_bound=0, upper_bound=65535
  )
  image_feats = cli.define_path("image-feats", "Image features to search in, .jsonl or .npy.")
  text_feats = cli.define_path("text-feats", "Text features to search in, .jsonl or .npy.")
  codec = cli.define_path("codec", "VQGAN that OFAs draw with; default: what their runs name.")
  judge = cli.define_path("judge", "CLIP that chooses among what they draw; default: likewise.")
  precision = cli.define_precision()
  most = flags.DEFINE_integer("max-batch", 16, "Rows computed together.", lower_bound=1)
  wait = flags.DEFINE_float(
    "max-wait-ms", 5.0, "Milliseconds that a row waits for others.", lower_bound=0.0
  )
  compiled = flags.DEFINE_bool(
    "compile", True, "Compile all programs before requests are taken; else at the first of a kind."
  )
  remember = flags.DEFINE_integer(
    "remember",
    4096,
    "Pictures whose features are kept: one that comes again is not encoded again.",
    lower_bound=0,
  )
  most_of = {
    "body": flags.DEFINE_integer("max-body-mb", 32, "MiB of a request."),
    "pixels": flags.DEFINE_integer("max-pixels", 25_000_000, "Pixels of a picture."),
    "images": flags.DEFINE_integer("max-images", 64, "Pictures of a request."),
    "texts": flags.DEFINE_integer("max-texts", 256, "Texts of a request."),
    "letters": flags.DEFINE_integer("max-letters", 512, "Characters of a text."),
    "top_k": flags.DEFINE_integer("max-top-k", 100, "Rows that a search tells."),
    "queue": flags.DEFINE_integer("max-queue", 512, "Rows of all clients that wait."),
    "deadline": flags.DEFINE_float("deadline", 60.0, "Seconds for an answer."),
  }

  def command():
    with _extra():
      from ofa_jax.serving import app, limits, server
      from ofa_jax.serving.models import CLIP, name_of, served
      from ofa_jax.serving.service import Service
    log.quiet_libraries()
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    # Of texts that are cut: Python remembers every one that it has shown.
    warnings.filterwarnings("ignore", message="Cut a text")
    values = {name: flag.value for name, flag in most_of.items()}
    bounds = limits.Limits(**values | {"body": values["body"] << 20})
    sock = ports.listening(host.value, port.value)  # before anything is loaded
    files = {"image": image_feats.value, "text": text_feats.value}
    files = {kind: path for kind, path in files.items() if path}
    models = []
    for place in map(cli_parsers.expand, places.value):
      model, _ = api.load_from_name(place, precision=precision.value)
      options = {"files": files, "top_k": bounds.top_k, "remember": remember.value}
      options |= {"codec": codec.value, "judge": judge.value}
      models.append(served(name_of(place), model, **options))
    if files and not any(isinstance(model, CLIP) for model in models):
      raise ValueError(f"Expected a Chinese-CLIP to search with in {', '.join(files.values())}")
    service = Service(models, limits=bounds, most=most.value, wait=wait.value / 1000)
    only = ports.LOCAL if ports.is_local(sock) else None
    site = server.Server(
      app.application(service, hosts=only), service=service, host=host.value, port=port.value
    )
    faults = []

    def make_ready():
      try:
        service.compile(now=compiled.value, told=_say)
        _say("Ready")
      except BaseException as error:
        faults.append(error)
        service.stop()

    url = ports.url(sock)
    _say(f"Listening at {url}, page {url}/docs")
    threading.Thread(target=make_ready, name="compile", daemon=True).start()
    site.run(sockets=[sock])
    if faults:
      raise faults[0]
    done = service.close(within=0.0 if site.force_exit else 1.0)
    _say("Stopped" if done else "Stopped amid what nobody waits for")
    processes.end(0)  # what is being compiled cannot be interrupted otherwise

  cli.run(command, interrupted="the same command starts anew")


@contextlib.contextmanager
def _extra():
  """ValueError that names the extra, where its libraries are not there."""
  try:
    yield
  except ModuleNotFoundError as error:
    if (error.name or "").startswith("ofa_jax"):
      raise
    raise ValueError(
      f"Expected the libraries of the extra serve, found no {error.name}: {EXTRA}"
    ) from error


def _say(text: str) -> None:
  print(text, flush=True)


if __name__ == "__main__":
  main()
