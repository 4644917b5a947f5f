"""The import arrows of the package, and what it never imports."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ofa_jax"

# What a part of the package may import of the others, and of its own; arrows go up in this table.
NUMPY = {
  *("tokenizers", "data", "scoring"),
  *("files", "text_files", "checksums", "pictures", "fonts", "partial", "outputs", "shards"),
  *("configs", "storage", "staging", "ports"),
}
GROUND = {"config", "validation", "trees", "numerics"}
PURE = {"losses", "losses_policy", "losses_vocabulary", "host_calls", "models", "decode"}
STORED = {"convert", "hub", "weights", "calibrations", "first_state"}
INFERENCE = {"inference", "api"}
COMMANDS = {
  *("train", "evaluate", "extract_features", "retrieve", "zeroshot", "compile_ahead"),
  *("validate_data", "prepare_data", "calibrate"),
  *("serve", "demo", "page", "score_images"),
  *("tokenize_images", "draw_files", "jobs"),
  *("generate", "cli", "cli_help", "cli_parsers", "__main__"),
}
COMMANDS |= {"export"}
SERVED = {"serving"}  # what the commands give to others
BELOW = {
  **dict.fromkeys(NUMPY, NUMPY),
  **dict.fromkeys(GROUND, GROUND | NUMPY),
  **dict.fromkeys({"engine", "ahead"}, GROUND | {"engine", "files", "checksums", "storage"}),
  **dict.fromkeys(PURE, PURE | {"trees", "numerics"} | NUMPY),
  **dict.fromkeys(STORED, STORED | PURE | GROUND | NUMPY | {"engine"}),
  "tasks": STORED | PURE | {"trees", "numerics"} | NUMPY,
  **dict.fromkeys(INFERENCE, INFERENCE | {"tasks", "engine"} | STORED | PURE | GROUND | NUMPY),
  **dict.fromkeys(SERVED, INFERENCE | {"retrieve"} | GROUND | NUMPY),
  "exporting": {"tasks"} | STORED | PURE | GROUND | NUMPY,
  **dict.fromkeys(COMMANDS, None),  # anything
}
NEVER = {"torch", "tensorflow", "gradio", "torchvision", "cn_clip"}
NEVER |= {"onnx", "onnx_ir", "onnxruntime", "jax2onnx"}


def imports(path):
  """(module, at import time?) for every import statement of a file."""
  tree = ast.parse(path.read_text(encoding="utf-8"))
  lazy = {
    id(node)
    for function in ast.walk(tree)
    if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
    or (isinstance(function, ast.If) and ast.unparse(function.test) == "TYPE_CHECKING")
    for node in ast.walk(function)
  }
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from ((alias.name, id(node) not in lazy) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      yield from ((f"{node.module}.{alias.name}", id(node) not in lazy) for alias in node.names)


def part(path):
  parts = path.relative_to(PACKAGE).with_suffix("").parts
  return parts[-1] if parts[-1] == "__main__" else parts[0]  # the command of a folder


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows(path):
  if path == PACKAGE / "__init__.py":
    return
  assert part(path) in BELOW, f"give {part(path)} a place in the table"
  allowed = BELOW[part(path)]
  for name, _ in imports(path):
    if name.startswith("ofa_jax.") and allowed is not None:
      assert name.split(".")[1] in allowed | {part(path)}, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_libraries_stay_out(path):
  for name, at_import in imports(path):
    library = name.split(".")[0]
    if library in NEVER:
      alone = path.parent.name == "beside"  # with an exported model, where there is no ofa_jax
      lazy = part(path) in {"convert", "page", "exporting", "__main__"} and not at_import
      assert alone or lazy, f"{path.name} imports {name}"
    if part(path) in NUMPY:
      assert library not in {"jax", "flax", "optax"}, f"{path.name} imports {name}"


def test_nothing_imports_configs():
  for path in FILES:
    assert not any(n.removeprefix("ofa_jax.").startswith("configs.") for n, _ in imports(path)), (
      path
    )


def test_recipes_import_each_other_where_the_package_has_them():
  """A top-level `configs` is there in the repository only, or is a folder of somebody else's."""
  for path in (ROOT / "configs").glob("*.py"):
    assert not any(name.startswith("configs.") for name, _ in imports(path)), path


def test_nothing_runs_code_of_weights():
  forbidden = {"torch.load", "torch.jit", "jit.load", "pickle.load", "pickle.loads", "numpy.load"}
  for path in FILES:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    assert not calls & forbidden, path
    assert part(path) != "convert" or "pickle" not in {name for name, _ in imports(path)}


def test_there_is_no_circle():
  """Of what is imported when a file is imported; the names of a package are those of its files."""
  names = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in FILES
  }
  arrows = {}
  for name, path in names.items():
    targets = {n for n, at_import in imports(path) if at_import and n.startswith("ofa_jax")}
    targets |= {n.rpartition(".")[0] for n in targets}  # `from module import name`
    arrows[name] = targets & names.keys() - {name}

  def walk(name, way):
    assert name not in way, " -> ".join([*way[way.index(name) :], name])
    if name not in done:
      for target in sorted(arrows[name]):
        walk(target, [*way, name])
      done.add(name)

  done = set()
  for name in arrows:
    walk(name, [])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_short(path):
  assert len(path.read_text(encoding="utf-8").splitlines()) <= 450
