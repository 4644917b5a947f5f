"""Times read from a TPU program: loops as often as they run, parts by the names of operations."""

import pytest

from ofa_jax.ahead import cost

# As the TPU's compiler writes it, shortened: what is inside a fusion has no estimate of its own.
TEXT = """HloModule jit_step, is_scheduled=true

%fused (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0:T(8,128)} parameter(0)
  ROOT %m = f32[8,4]{1,0:T(8,128)} multiply(%p, %p), metadata={op_name="jit(step)/linear/mul" stack_frame_id=1}
}

%body (s: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %s = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  %dot = f32[8,4]{1,0:T(8,128)} fusion(%s), kind=kOutput, calls=%fused, metadata={op_name="jit(step)/jvp()/while/body/closed_call/linear/dot_general" stack_frame_id=2}, backend_config={"window_config":{"estimated_cycles":"100"}}
  %norm = f32[8,4]{1,0:T(8,128)} fusion(%dot), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/transpose(jvp(norm))/checkpoint/rematted_computation/reduce_sum" stack_frame_id=3}, backend_config={"window_config":{"estimated_cycles":"20"}}
  %kernel = f32[8,4]{1,0:T(8,128)} custom-call(%norm), custom_call_target="tpu_custom_call"
  ROOT %t = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) tuple(%i, %norm)
}

%condition (s: (s32[], f32[8,4])) -> pred[] {
  %s = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  %n = s32[]{:T(128)} constant(24)
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY %main (w: f32[8,4]) -> f32[8,4] {
  %w = f32[8,4]{1,0:T(8,128)} parameter(0)
  %loop = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) while(%init), condition=%condition, body=%body
  %update = f32[8,4]{1,0:T(8,128)} fusion(%w), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/optimizer/jit(_where)/select_n" stack_frame_id=4}, backend_config={"window_config":{"estimated_cycles":"120"}}
  ROOT %copy = f32[8,4]{1,0:T(8,128)} copy(%update), backend_config={"window_config":{"estimated_cycles":"0"}}
}
"""  # noqa: E501


def test_cycles_are_summed_over_loops_and_by_part():
  found = cost.estimate(TEXT)
  assert found.cycles == 24 * (100 + 20) + 120
  assert found.parts == {
    "linear": 2400 / 3000, "norm": 480 / 3000, "optimizer": 120 / 3000, "other": 0
  }  # fmt: skip
  assert list(found.parts) == ["linear", "norm", "optimizer", "other"]
  assert found.passes == {"forward": 2520 / 3000, "computed again": 480 / 3000}
  assert found.operations["linear/dot_general"] == 0.8
  assert found.without == 24  # the kernels


def test_only_the_operations_that_lead_are_named():
  assert list(cost.estimate(TEXT, num=1).operations) == ["linear/dot_general"]


def test_a_prediction_is_of_one_device():
  found = cost.predict(cost.estimate(TEXT), clock=1.5e9, peak=1e12, rows=64, model_flops=500_000)
  assert found.seconds == pytest.approx(2e-6)
  assert found.rows_per_second == pytest.approx(32e6)
  assert found.share_of_peak == pytest.approx(0.25)


def test_where_nothing_is_estimated_nothing_is_predicted():
  assert cost.estimate("HloModule jit_step\n") is None
  known = {"peak": 1e12, "rows": 64, "model_flops": 500_000}
  assert cost.predict(None, clock=1.5e9, **known) is None
  assert cost.predict(cost.estimate(TEXT), clock=None, **known) is None
