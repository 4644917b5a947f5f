"""What a rented machine means for a run: chip-hours, their price, and how fast it can leave."""

from ofa_jax.ahead import stopping
from ofa_jax.engine.log import human_bytes

_STEPS = 1000  # to speak of where the length of the run is not known


def rows(
  save: stopping.Save,
  *,
  seconds: float,
  bound: bool,
  steps: int | None,
  chips: float,
  price: float | None,
) -> list[tuple[str, str]]:
  """Lines of a table.

  Args:
    save: a checkpoint.
    seconds: of a step.
    bound: a step takes at least so long, and no forecast is known.
    steps: of the run; None: not known without its data.
    chips: that are rented.
    price: dollars for a chip and hour; None: not known.
  """
  num = steps or _STEPS
  hours = num * seconds * chips / 3600
  least = "at least " if bound else ""
  lines = [
    ("rented", "by the step at peak, no forecast" if bound else "by the predicted step"),
    ("  chip-hours", f"{least}{hours:,.4g} for {num:,} steps, evaluations and starts apart"),
  ]
  if price is not None:
    hourly = f"an hour of {chips:g} chips at ${price:g} is ${chips * price:,.2f}"
    lines.append(("  cost", f"{least}${hours * price:,.2f}; {hourly}"))
  parts = save.seconds(seconds)
  shares = ", ".join(f"{name} {value:.2g}" for name, value in parts.items())
  rates = (
    f"{stopping.DEVICE_RATE / 1e9:g} GB/s a device and {stopping.BUCKET_RATE / 1e6:g} MB/s a host"
  )
  return [
    *lines,
    (
      "  checkpoint",
      f"{human_bytes(save.total)} by {save.hosts} hosts, {human_bytes(save.host)} by the busiest",
    ),
    ("  SIGTERM to saved", f"{least}{sum(parts.values()):.1f} s: {shares}; assumed are {rates}"),
  ]
