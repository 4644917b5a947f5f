"""Shares of rows: their bounds, their files, and what is made of them."""

import itertools

import pytest

from ofa_jax import shards
from ofa_jax.shards import Shard

TASK = {"SLURM_ARRAY_TASK_ID": "2"}


@pytest.mark.parametrize(("total", "num", "size"), [(100, 4, 7), (3, 4, 2), (0, 2, 5), (64, 3, 8)])
def test_shares_are_whole_batches_and_together_all_rows(total, num, size):
  bounds = [Shard(i, num).rows(total, batch_size=size) for i in range(num)]
  assert bounds[0][0] == 0 and bounds[-1][1] == total
  assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(bounds))
  assert all(begin % size == 0 or begin == total for begin, _ in bounds)
  batches = [-(-(end - begin) // size) for begin, end in bounds]
  assert max(batches) - min(batches) <= 1


def test_flags():
  assert shards.parse(None, environ={}) is None
  assert shards.parse("3/4", environ={}) == Shard(3, 4)
  assert shards.parse("array/4", environ=TASK) == Shard(2, 4)
  assert shards.parse("merge/4", environ={}) == Shard(None, 4)
  assert Shard(3, 4).place("d/x.img_feat.npy").as_posix() == "d/x.img_feat.00003-of-00004.npy"


@pytest.mark.parametrize("text", ["4/4", "3", "a/4", "1/0", "-1/4", "1/x", "array", "array/2"])
def test_faulty_flags(text):
  with pytest.raises(ValueError, match=r"Expected .*shard=.* found"):
    shards.parse(text, environ=TASK)
  with pytest.raises(ValueError, match="without SLURM_ARRAY_TASK_ID"):
    shards.parse("array/4", environ={})


def test_parts_of_one_work_become_one(tmp_path):
  output = tmp_path / "x.jsonl"
  whole = Shard(None, 3)

  def make(index, **work):
    place = Shard(index, 3).place(output)
    files = {"files": 1, "bytes": 2**30, "sha256": f"of the times on host {index}"}
    shards.note(place, {"input": files, "batch size": 2, "shard": f"{index}/3", **work})
    place.write_text(f"{index}\n")

  make(0)
  make(2)
  with pytest.raises(ValueError, match=r"found no .*00001-of-00003.*Run --shard=I/3"):
    shards.merge(output, whole)
  make(1, **{"batch size": 3})
  with pytest.raises(ValueError, match="different batch size"):
    shards.merge(output, whole)
  assert not output.exists()
  make(1)
  assert shards.merge(output, whole) == 3
  assert output.read_text() == "0\n1\n2\n"
