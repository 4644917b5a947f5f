"""Collectives read from HLO text: written by hand, and of a program compiled for eight devices."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ofa_jax import hlo, sharding

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
