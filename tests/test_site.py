"""The site of docs/ builds without a warning and loads nothing from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
  for name in ("mkdocs", "material", "mkdocstrings"):
    pytest.importorskip(name, reason="the extra docs is not installed")
  folder = tmp_path_factory.mktemp("site")
  result = subprocess.run(
    [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={folder}"],
    capture_output=True, text=True, timeout=300, cwd=ROOT,
    env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"},
  )  # fmt: skip
  assert result.returncode == 0, result.stderr
  assert "WARNING" not in result.stderr, result.stderr
  return folder


def test_every_page_is_in_the_site(site):
  pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
  pages |= {f"notebook_{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb")}
  assert {*pages, "launch", "contributing", "changelog"} <= {p.stem for p in site.glob("*.html")}
  assert not list(site.rglob("*.py"))


def test_the_api_is_that_of_the_docstrings(site):
  page = (site / "api.html").read_text(encoding="utf-8")
  for text in ("ofa_jax.api.load_from_name", "CNCLIPModel.encode_image", "OFAModel.caption"):
    assert f'id="{text}' in page or f".{text}" in page, text
  assert "Loads a model on the devices of this machine." in page


def test_nothing_is_loaded_from_elsewhere(site):
  loads = re.compile(
    r"""<(?:script|img|iframe)[^>]*\ssrc=["']?(https?:)?//|@import|url\(["']?https?:"""
  )
  links = re.compile(r"<link[^>]*rel=[\"']?(?:stylesheet|preconnect|preload)[^>]*>")
  for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
    text = path.read_text(encoding="utf-8")
    assert not loads.search(text), path
    assert not [x for x in links.findall(text) if "//" in x], path
