"""What the service counts, in the form that Prometheus reads."""

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Measures:
  """Counters of one service.

  Attributes:
    requests: answered, by path and status.
    seconds: from the first byte of a request's body to its answer, by path.
    refused: requests that got no answer, by reason.
    rows: of each batch, by what was computed.
    waiting: rows that wait for the models.
    active: requests that are not answered yet.
  """

  def __init__(self):
    """Starts at zero."""
    self._registry = CollectorRegistry()
    to = {"registry": self._registry}
    self.requests = Counter(
      "ofa_jax_requests", "Requests that were answered.", ["path", "status"], **to
    )
    self.seconds = Histogram(
      "ofa_jax_request_seconds", "From a request to its answer.", ["path"], buckets=_SECONDS, **to
    )
    self.refused = Counter("ofa_jax_refused", "Requests without an answer.", ["reason"], **to)
    self.rows = Histogram(
      "ofa_jax_batch_rows", "Rows that were computed together.", ["what"], buckets=_ROWS, **to
    )
    self.waiting = Gauge("ofa_jax_waiting_rows", "Rows that wait for the models.", **to)
    self.active = Gauge("ofa_jax_active_requests", "Requests that are not answered yet.", **to)

  def text(self) -> bytes:
    """All of them, for Prometheus."""
    return prometheus_client.generate_latest(self._registry)
