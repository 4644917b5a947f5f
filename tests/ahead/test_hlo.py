"""Collectives read from HLO text: written by hand, and of a program compiled for eight devices."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ofa_jax.ahead import hlo
from ofa_jax.engine import sharding

TEXT = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %g = bf16[16,4]{1,0:T(8,128)(2,1)} all-gather(%x), dimensions={0}
  %r = (f32[8,4]{1,0}, f32[]) all-reduce(%y, %z), to_apply=%add
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%i, %r)
}

%condition (p: (s32[], f32[8,4])) -> pred[] {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (w: f32[8,4]) -> f32[8,4] {
  %w = f32[8,4]{1,0} parameter(0)
  %loop = (s32[], f32[8,4]) while(%init), condition=%condition, body=%inner, backend_config={"known_trip_count":{"n":"24"}}
  %start = (f32[8,4]{1,0}, f32[32,4]{1,0}) all-gather-start(%w), dimensions={0}
  %done = f32[32,4]{1,0} all-gather-done(%start)
  ROOT %end = f32[8,4]{1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_loops_and_asynchronous_starts():
  found = hlo.collectives(TEXT)
  assert found == {
    "all-gather": hlo.Collective(calls=25, num_bytes=24 * 16 * 4 * 2 + 32 * 4 * 4),
    "all-reduce": hlo.Collective(calls=24, num_bytes=24 * (8 * 4 + 1) * 4),
  }


# As the TPU's compiler writes it: no trip count, parts of one collective, a scatter inside a sum.
TPU = """HloModule jit_step, is_scheduled=true

%part.1 (p: bf16[4,8]) -> (bf16[4,8], bf16[32,8]) {
  %g.1 = bf16[32,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, dimensions={0}
}

%part.2 (p: bf16[4,8]) -> (bf16[4,8], bf16[32,8]) {
  %g.2 = bf16[32,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, dimensions={0}
}

%all-reduce-scatter.3 (p: bf16[64,8]) -> bf16[8,8] {
  %r = bf16[64,8]{1,0} all-reduce(%p), channel_id=9, to_apply=%add
}

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %a = (bf16[4,8]{1,0}, bf16[32,8]{1,0}) fusion(%x), kind=kCustom, calls=%part.1
  %b = (bf16[4,8]{1,0}, bf16[32,8]{1,0}) fusion(%a), kind=kCustom, calls=%part.2
  %c = bf16[8,8]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.3
}

%condition (p: (s32[], bf16[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(32)
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main.1 (w: bf16[4,8]) -> bf16[4,8] {
  %loop = (s32[]{:T(128)}, bf16[4,8]) while(%init), condition=%condition, body=%body
  %s = (f32[2,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%t), channel_id=6, is_host_transfer=true
}
"""


def test_how_tpus_write_them():
  assert hlo.collectives(TPU) == {
    "all-gather": hlo.Collective(calls=32, num_bytes=32 * 32 * 8 * 2),
    "reduce-scatter": hlo.Collective(calls=32, num_bytes=32 * 8 * 8 * 2),
    "send": hlo.Collective(calls=1, num_bytes=2 * 8 * 128 * 4),
  }


def test_a_compiled_loop():
  mesh = sharding.make_mesh((8, 1, 1))

  def gather(x):
    def body(total, _):
      return total + jax.lax.all_gather(jnp.sin(total[:1]), "data", tiled=True), None

    return jax.lax.scan(body, x, length=3)[0]

  split = jax.shard_map(gather, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
  text = jax.jit(split).lower(jnp.ones((8, 4))).compile().as_text()
  assert hlo.collectives(text) == {"all-gather": hlo.Collective(calls=3, num_bytes=3 * 8 * 4 * 4)}


def test_nothing_to_read():
  assert hlo.collectives("") == {}
