"""Ports that the service and the page listen at."""

import pytest

from ofa_jax import ports


def test_a_port_is_taken_at_once():
  with ports.listening("localhost", 0) as sock:
    assert ports.is_local(sock)
    host, port = sock.getsockname()[:2]
    assert ports.url(sock) in (f"http://127.0.0.1:{port}", f"http://[::1]:{port}")
    told = rf"--port={port}, found: Address already in use.*--port=0 takes any"
    with pytest.raises(ValueError, match=told):
      ports.listening(host, port)
  with ports.listening("0.0.0.0", 0) as sock:
    assert not ports.is_local(sock)


def test_another_machine_is_no_place_to_listen_at():
  with pytest.raises(ValueError, match=r"Expected a place .* in --host=192\.0\.2\.1 --port=0"):
    ports.listening("192.0.2.1", 0)
