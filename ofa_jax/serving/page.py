"""What people and programs read: a page of the operations that loads nothing, and arrays."""

import dataclasses
import html
import io
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ofa_jax.serving.limits import Limits

# The browser is told, too, that nothing is loaded and nothing runs.
HEADERS = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
_STYLE = (
  "body {font-family: sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em} "
  "code, pre {background: #f3f4f6; padding: .1em .3em} pre {padding: .6em; overflow-x: auto} "
  "td {vertical-align: top; padding: .1em .8em .1em 0} h2 {margin-top: 1.6em; font-size: 1.1em}"
)


def npy(array: np.ndarray) -> bytes:
  """An array as a `.npy` file."""
  file = io.BytesIO()
  np.save(file, array, allow_pickle=False)
  return file.getvalue()


def page(schema: Mapping[str, Any], *, limits: Limits) -> str:
  """An HTML page of an OpenAPI schema.

  Args:
    schema: of the application.
    limits: of its requests.
  """
  title = f"{_text(schema['info']['title'])} {_text(schema['info']['version'])}"
  parts = [
    f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{title}</title>",
    f"<style>{_STYLE}</style><h1>{title}</h1>",
    "<p>Bodies are JSON or forms (multipart/form-data) with the same fields. Errors are JSON with "
    "<code>detail</code>. The same for programs: <a href='openapi.json'>openapi.json</a>.</p>",
    "<p>Limits of a request:</p><table>",
    *(
      f"<tr><td><code>{field.name}</code><td>{value:,}"
      for field in dataclasses.fields(limits)
      if (value := getattr(limits, field.name)) is not None
    ),
    "</table>",
  ]
  for path, methods in schema["paths"].items():
    for method, operation in methods.items():
      parts += _operation(path, method, operation)
  return "\n".join(parts)


def _operation(path: str, method: str, operation: Mapping[str, Any]) -> Iterator[str]:
  yield f"<h2><code>{_text(method.upper())} {_text(path)}</code></h2>"
  yield f"<p>{_text(operation.get('summary', ''))}</p>"
  body = operation.get("requestBody")
  if body is None:
    return
  fields = body["content"]["application/json"]["schema"]
  yield "<table>"
  for name, field in fields["properties"].items():
    needed = "" if name in fields.get("required", ()) else " (may be left out)"
    yield f"<tr><td><code>{_text(name)}</code><td>{_text(field.get('description', ''))}{needed}"
  yield "</table>"
  form = " ".join(
    "-F images=@picture.jpg" if name == "images" else f'-F {name}="..."'
    for name in fields.get("required", ())
  )
  yield f"<pre>curl {form} http://127.0.0.1:8000{_text(path)}</pre>"
  example = operation["responses"]["200"]["content"]["application/json"]["example"]
  yield f"<pre>{_text(example)}</pre>"


def _text(text: str) -> str:
  return html.escape(str(text))
