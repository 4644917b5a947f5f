"""A port that the service or the page listens at, taken before anything slow is done."""

import socket

LOCAL = ("localhost", "127.0.0.1", "::1", "[::1]")  # names of this machine, for itself alone


def listening(host: str, port: int) -> socket.socket:
  """A socket that listens.

  Args:
    host: a name or an address of this machine.
    port: 0 is any that is free.

  Raises:
    ValueError: it cannot be had, for instance as another process listens there.
  """
  try:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
      sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      sock.bind(address)
      sock.listen()  # only now no other process gets the port
    except BaseException:
      sock.close()
      raise
  except (OSError, OverflowError) as error:
    reason = getattr(error, "strerror", None) or error
    raise ValueError(
      f"Expected a place to listen at in --host={host} --port={port}, found: {reason}. Another "
      "--port may be free; --port=0 takes any."
    ) from error
  return sock


def is_local(sock: socket.socket) -> bool:
  """Whether only this machine reaches it."""
  return sock.getsockname()[0] in LOCAL


def url(sock: socket.socket) -> str:
  """The address of it for a browser."""
  host, port = sock.getsockname()[:2]
  return f"http://{f'[{host}]' if ':' in host else host}:{port}"
