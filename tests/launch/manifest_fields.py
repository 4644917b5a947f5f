"""The fields of the manifests with their types: a compact table of those that are used here.

By the API of Kubernetes (core/v1, batch/v1), JobSet (v1alpha2) and SkyPilot's task files. A key
that is not in the table is taken for a typo; a new one is looked up and put in.
"""

ANY_NAME = "*"  # a mapping with names of one's own as keys

_META = {"name": str, "labels": {ANY_NAME: str}, "annotations": {ANY_NAME: str}}
_CONTAINER = {
  "name": str,
  "image": str,
  "command": [str],
  "env": [{"name": str, "value": str, "valueFrom": {"fieldRef": {"fieldPath": str}}}],
  "ports": [{"containerPort": int}],
  "resources": {"limits": {ANY_NAME: str}},
  "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool}],
}
_POD = {
  "restartPolicy": {"Never", "OnFailure"},  # what a Job allows
  "serviceAccountName": str,
  "terminationGracePeriodSeconds": int,
  "nodeSelector": {ANY_NAME: str},
  "containers": [_CONTAINER],
  "volumes": [
    {
      "name": str,
      "csi": {"driver": str, "readOnly": bool, "volumeAttributes": {ANY_NAME: str}},
      "emptyDir": {"medium": {"", "Memory"}},
    }
  ],
}
_RULE = {
  "action": {"FailJob", "FailIndex", "Ignore", "Count"},
  "onExitCodes": {"containerName": str, "operator": {"In", "NotIn"}, "values": [int]},
  "onPodConditions": [{"type": str, "status": str}],
}
_JOB = {
  "completionMode": {"Indexed", "NonIndexed"},
  "parallelism": int,
  "completions": int,
  "backoffLimit": int,
  "podFailurePolicy": {"rules": [_RULE]},
  "template": {"metadata": _META, "spec": _POD},
}
_JOBSET = {
  "network": {"enableDNSHostnames": bool, "publishNotReadyAddresses": bool, "subdomain": str},
  "failurePolicy": {
    "maxRestarts": int,
    "rules": [
      {
        "name": str,
        "action": {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"},
        "onJobFailureReasons": [{"BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"}],
      }
    ],
  },
  "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": _JOB}}],
}

KINDS = {
  ("v1", "ServiceAccount"): {},
  ("batch/v1", "Job"): {"spec": _JOB},
  ("jobset.x-k8s.io/v1alpha2", "JobSet"): {"spec": _JOBSET},
}
SKY = {
  "name": str,
  "workdir": str,
  "num_nodes": int,
  "resources": {
    "accelerators": str,
    "use_spot": bool,
    "disk_size": int,
    "job_recovery": {"max_restarts_on_errors": int, "recover_on_exit_codes": [int]},
  },
  "envs": {ANY_NAME: (str, type(None))},
  "setup": str,
  "run": str,
}


def faults(value, kind, path: str = "") -> list[str]:
  """Where a value differs from what the table says of it.

  Args:
    value: as YAML is read.
    kind: a type, types, a set of values, [of the items] or {of the fields}.
    path: for the texts.
  """
  if isinstance(kind, dict):
    if not isinstance(value, dict):
      return [f"{path}: expected fields, found {value!r}"]
    wrong = []
    for key, item in value.items():
      of_key = kind.get(key, kind.get(ANY_NAME))
      if of_key is None:
        wrong.append(f"{path}.{key}: there is no such field, but {', '.join(kind)}")
      else:
        wrong += faults(item, of_key, f"{path}.{key}")
    return wrong
  if isinstance(kind, list):
    if not isinstance(value, list):
      return [f"{path}: expected a list, found {value!r}"]
    return [
      fault for i, item in enumerate(value) for fault in faults(item, kind[0], f"{path}[{i}]")
    ]
  if isinstance(kind, set):
    return [] if value in kind else [f"{path}: expected one of {sorted(kind)}, found {value!r}"]
  fits = isinstance(value, kind) and (not isinstance(value, bool) or kind is bool)
  return [] if fits else [f"{path}: expected {kind}, found {value!r}"]


def of_manifest(document: dict) -> list[str]:
  """Faults of one Kubernetes object."""
  kind = KINDS.get((document.get("apiVersion"), document.get("kind")))
  if kind is None:
    return [f"there is no {document.get('apiVersion')} {document.get('kind')}"]
  return faults(document, {"apiVersion": str, "kind": str, "metadata": _META, **kind})
