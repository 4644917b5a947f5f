"""A hook of MkDocs: pages that lie elsewhere in the repository, and the links to them."""

import json
import pathlib
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).parent.parent
ELSEWHERE = {
  "launch.md": ROOT / "launch" / "README.md",
  "contributing.md": ROOT / "CONTRIBUTING.md",
  "changelog.md": ROOT / "CHANGELOG.md",
  **{f"notebook_{path.stem}.md": path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))},
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Adds the pages."""
  for name, path in ELSEWHERE.items():
    text = path.read_text(encoding="utf-8")
    text = notebook(text) if path.suffix == ".ipynb" else text
    files.append(File.generated(config, name, content=text))
  return files


def notebook(text: str) -> str:
  """A notebook as a page: its texts, its code and what this was stored to have said."""
  parts = []
  for cell in json.loads(text)["cells"]:
    source = "".join(cell["source"])
    parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    for output in cell.get("outputs", []):
      shown = output.get("data", {})
      if "image/png" in shown:
        png = "".join(shown["image/png"]).replace("\n", "")
        parts.append(f"![What the cell shows](data:image/png;base64,{png})")
      else:
        said = "".join(output.get("text") or shown["text/plain"]).rstrip("\n")
        parts.append(f"```text\n{said}\n```")
  return "\n\n".join(parts) + "\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
  """Turns links between files of the repository into links between pages of the site."""
  page_path = page.file.src_uri
  source = ELSEWHERE.get(page_path, ROOT / "docs" / page_path)
  places = {path: name for name, path in ELSEWHERE.items()}

  def turned(link: re.Match) -> str:
    target, hash_, anchor = link[1].partition("#")
    if not target or re.match(r"[a-z]+:", target):
      return link[0]
    path = (source.parent / target).resolve()
    if path in places:
      return f"]({places[path]}{hash_}{anchor})"
    if path.is_relative_to(ROOT / "docs"):
      return f"]({path.relative_to(ROOT / 'docs').as_posix()}{hash_}{anchor})"
    return link[0]

  return re.sub(r"\]\(([^)\s]+)\)", turned, markdown)
