"""What README and docs name exists: commands, flags, fields, files, modules, links, pictures."""

import ast
import dataclasses
import functools
import importlib
import itertools
import re

import pytest

from ofa_jax.config import Config, Eval, MeshShape, Optim
from tests.documents import PAGES, ROOT, codes_of, text_of

# What the functions of `cli` define.
SHARED = {
  "define_stage": ("stage",),
  "define_config": ("config", "distributed", "start-timeout"),
  "define_distributed": ("distributed", "start-timeout"),
  "define_precision": ("precision",),
  "define_interrupted_status": ("interrupted-status",),
  "define_shard": ("shard",),
}
ANY = ("help", "helpfull")


@functools.cache
def flags_of(path):
  """The flags that a file defines, found without running it."""
  names = set(ANY)
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.ImportFrom) and "main" in [alias.name for alias in node.names]:
      names |= flags_of(ROOT.joinpath(*node.module.split(".")).with_suffix(".py"))
    if not isinstance(node, ast.Call):
      continue
    name = ast.unparse(node.func).rpartition(".")[2]
    names |= set(SHARED.get(name, ()))
    if name.startswith("DEFINE") or name in ("define_path", "define_paths", "add_argument"):
      names |= {a.value.lstrip("-") for a in node.args[:1] if isinstance(a, ast.Constant)}
  return names


def command_file(command):
  module = re.search(r"-m (ofa_jax[\w.]*)", command)
  if module:
    path = ROOT.joinpath(*module[1].split("."))
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
  script = re.search(r"python3? ((?:tools|benchmarks|launch)/\w+\.py)", command)
  return ROOT / script[1] if script else None


def commands_of(page):
  """(file, arguments) of every command; `a; b`, `a && b` and `a -- b` are two."""
  for code in codes_of(page):
    code = re.sub(r"(^|\s)#.*", "", code)
    for command in re.split(r"&&|;|\|\s|\s--\s", code):
      path = command_file(command)
      if path is not None:
        yield path, command


@functools.cache
def dataclasses_of(package):
  """All dataclasses of a package's files."""
  kinds = set()
  for path in sorted((ROOT / "ofa_jax" / package).rglob("*.py")):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    values = vars(importlib.import_module(name)).values()
    kinds |= {v for v in values if isinstance(v, type) and dataclasses.is_dataclass(v)}
  return kinds


def has_field(path):
  """Is there a field of this path in a config?"""
  first, *rest = path.split(".")
  names = {f.name for f in dataclasses.fields(Config)}
  if re.sub(r"\[\d+\]$", "", first) not in names:
    return False
  if not rest:
    return True
  kinds = {"optim": {Optim}, "mesh": {MeshShape}, "evals[0]": {Eval}}.get(first)
  if first.startswith("evals[") and rest[0] == "task":
    return len(rest) == 1 or has_field(".".join(["task", *rest[1:]]))
  if first == "task" and rest[0] in ("tasks", "shares", "weights") and len(rest) > 1:  # by names
    return len(rest) == 2 or has_field(".".join(["task", *rest[2:]]))
  if kinds is None:
    kinds = dataclasses_of("tasks" if first == "task" else "models")
    kinds |= dataclasses_of("decode") | dataclasses_of("data")  # what is in them
  known = {f.name for kind in kinds for f in dataclasses.fields(kind)}
  return all(re.sub(r"\[\d+\]$", "", name) in known for name in rest)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_and_their_flags_exist(page):
  faults = []
  for path, command in commands_of(page):
    if not path.is_file():
      faults.append(f"{command}: there is no {path.relative_to(ROOT)}")
      continue
    own = re.split(r"-m ofa_jax|python3? ", command, maxsplit=1)[
      -1
    ]  # not those of sbatch before it
    for flag in re.findall(r"(?<!\S)--(?:no)?([\w-]+)(?=[=\s\]]|$)", own):
      known = flags_of(path)
      if flag not in known and f"no{flag}" not in known:
        faults.append(f"{command}: {path.name} has no --{flag}")
  assert not faults, "\n".join(faults)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_fields_of_configs_exist(page):
  faults = []
  for code in codes_of(page):
    for path in re.findall(r"--config\.([\w.\[\]/]*\w)", code):
      head, _, last = path.rpartition(".")
      faults += [
        f"{code}: {field}"
        for field in (f"{head}.{name}" if head else name for name in last.split("/"))
        if not has_field(field) and not field.isupper()
      ]
  assert not faults, "\n".join(faults)


def expanded(pattern):
  """The names of a shell pattern's {a,b}."""
  parts = [
    p[1:-1].split(",") if p[0] == "{" else [p] for p in re.findall(r"\{[^}]*\}|[^{]+", pattern)
  ]
  return ["".join(names) for names in itertools.product(*parts)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_are_named_exist(page):
  faults = []
  for code in codes_of(page):
    named = re.findall(r"(?<![\w/.$])((?:[\w.\-*]+/)*[\w\-*{},]+\.py)\b", code)
    named += re.findall(
      r"(?<![\w/.$])((?:ofa_jax|configs|tests|benchmarks|tools|launch)/[\w/\-*.{},]*)", code
    )
    for pattern in named:
      for name in expanded(pattern.rstrip(".")):
        if re.fullmatch(r"configs/[A-Z]\.py|.*/[A-Z]\.py|[A-Z]\.py", name):
          continue  # stands for any
        here = any(list(base.glob(name)) for base in (ROOT, ROOT / "ofa_jax"))
        if "/" not in name:  # anywhere
          here = here or any(any((ROOT / f).rglob(name)) for f in ("ofa_jax", "configs"))
        if not here and not is_of_the_originals(name):
          faults.append(f"{code}: {name}")
  assert not faults, "\n".join(faults)


def is_of_the_originals(name):
  """The left side of the page for those who come from them; launchers of clusters."""
  begins = ("preprocess/", "training/", "eval/", "deploy/", "run_scripts/", "cn_clip/", "utils/")
  return name.startswith(begins)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_and_names_exist(page):
  faults = []
  for code in codes_of(page):
    for dotted in set(re.findall(r"(?<![\w/.@~-])(ofa_jax(?:\.\w+)+)", code)):
      if dotted.endswith((".py", ".egg")):
        continue
      parts = dotted.split(".")
      value, left = None, parts
      for end in range(len(parts), 0, -1):
        try:
          value, left = importlib.import_module(".".join(parts[:end])), parts[end:]
          break
        except ModuleNotFoundError:
          continue
      for name in left:
        value = getattr(value, name, None)
      if value is None:
        faults.append(f"{code}: {dotted}")
  assert not faults, "\n".join(faults)


def anchors(page):
  titles = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
  faults = []
  for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
    if re.match(r"https?:", link):
      continue
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    if not target.exists():
      faults.append(link)
    elif anchor and anchor not in anchors(target):
      faults.append(f"{link}: {', '.join(sorted(anchors(target)))}")
  assert not faults, "\n".join(faults)


def test_pages_are_found_from_the_readme_or_in_the_site():
  linked = {
    (ROOT / link).resolve() for link in re.findall(r"\]\(([^)#\s]+)", text_of(ROOT / "README.md"))
  }
  listed = set(re.findall(r"^ +- (\w+\.md)$", text_of(ROOT / "mkdocs.yml"), re.MULTILINE))
  pages = {page for page in (ROOT / "docs").glob("*.md")}
  assert pages <= linked | {ROOT / "docs" / name for name in listed}
  assert {page.name for page in pages} <= listed


def test_extras_that_are_named_exist():
  project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
  extras = re.findall(
    r"^(\w+) = \[", project.partition("[project.optional-dependencies]")[2], re.MULTILINE
  )
  named = {
    extra
    for page in PAGES
    for group in re.findall(r"\.\[([\w,]+)\]\"", text_of(page))
    for extra in group.split(",")
  }
  assert named and named <= set(extras)


def test_what_is_on_no_index_is_not_installed_from_one():
  places = [*PAGES, *(ROOT / "ofa_jax").rglob("*.py"), *(ROOT / "tools").glob("*.py")]
  for path in places:
    assert not re.search(r"pip install [^\n]*ofa-jax", text_of(path)), path
