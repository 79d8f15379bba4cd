"""How λ, α and μ are chosen: the rules by themselves, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from natgrad import L2, AdaptiveStep, ConfigError, ConstantDamping, FixedStep, LevenbergMarquardt
from natgrad.steps import Alarm, Confirmation, Promise, QuadraticModel, Witness, damping_from, step_size_from

DTYPE = torch.float64


def test_levenberg_marquardt_trusts_a_good_model_more_and_a_bad_one_less() -> None:
    rule = LevenbergMarquardt()
    factor = rule.decay**rule.period
    assert rule.update(1.0, 0.9) == pytest.approx(factor)
    assert rule.update(1.0, 2.0) == pytest.approx(factor)
    assert rule.update(1.0, 0.5) == 1.0
    assert rule.update(1.0, 0.1) == pytest.approx(1 / factor)
    assert rule.update(1.0, -1.0) > rule.update(1.0, 0.1)
    assert rule.update(1.0, math.nan) > 1.0
    assert rule.update(1.0, -math.inf) > 1.0


@given(st.floats(1e-12, 1e12), st.floats(allow_nan=True), st.one_of(st.none(), st.floats(0, 3)))
def test_levenberg_marquardt_stays_within_its_bounds(
    damping: float, ratio: float, alpha: float | None
) -> None:
    rule = LevenbergMarquardt(least=1e-3, greatest=1e3)
    witness = None if alpha is None else Witness(alpha)
    assert 1e-3 <= rule.update(damping, ratio, witness) <= 1e3


def test_alpha_raises_the_damping_only_where_more_of_it_would_help() -> None:
    rule = LevenbergMarquardt()
    factor = rule.decay**rule.period
    assert rule.update(1.0, 1.0, Witness(0.15)) == pytest.approx(1 / factor)
    assert rule.update(1.0, 1.0, Witness(0.05)) == pytest.approx(1 / factor)
    assert rule.update(1.0, 1.0, Witness(0.3)) == 1.0
    assert rule.update(1.0, 1.0, Witness(0.5)) == pytest.approx(factor)
    assert rule.update(1.0, 1.0, Witness(0.05, share=0.5)) == 1.0  # the step is mostly plain descent already
    assert rule.update(1.0, -1.0, Witness(0.05, share=0.5)) > 1.0  # but the loss rose
    # Where a smaller one promises more, α is small for another reason.
    assert rule.update(1.0, 1.0, Witness(0.15), elasticity=0.2) == pytest.approx(factor)
    assert rule.update(1.0, 1.0, Witness(0.15), elasticity=0.01) == pytest.approx(1 / factor)
    assert rule.update(1.0, 0.1, Witness(0.15), elasticity=0.2) == pytest.approx(1 / factor)
    assert rule.update(1.0, 1.0, Witness(0.3), elasticity=0.2) == 1.0


def test_a_smaller_damping_is_tried_only_where_alpha_is_small() -> None:
    rule = LevenbergMarquardt()
    assert rule.trial(2.0, Witness(0.15)) == pytest.approx(2.0 * rule.factor)
    assert rule.trial(2.0, Witness(0.3)) is None
    assert rule.trial(2.0, None) is None
    assert damping_from(1e-3, adaptive=True).trial(1e-3, Witness(0.01)) is None


def test_a_witness_forgets() -> None:
    witness = Witness(1.0, 0.0)
    for _ in range(50):
        witness = witness.after(0.25, 0.5)
    assert witness.alpha == pytest.approx(0.25, rel=1e-3)
    assert witness.share == pytest.approx(0.5, rel=1e-3)


def test_confirmation_finds_the_part_of_a_slope_that_is_no_noise() -> None:
    # Along c the batch says slope −2 and curvature 2; of the slope −1.2 is true. Half of the step is taken, so that
    # the next batch sees the slope ½·(−1.2) + ½²·2 along it.
    seen = Confirmation().after(Promise(slope=-2.0, curvature=0.5, taken=0.5), slope=-0.6 + 0.5)
    assert seen.ratio == pytest.approx(0.6)
    for _ in range(100):  # and is right on average where single batches are not
        seen = seen.after(Promise(-2.0, 0.5, 0.5), -0.1 + 0.4).after(Promise(-2.0, 0.5, 0.5), -0.1 - 0.4)
    assert seen.ratio == pytest.approx(0.6, abs=0.05)
    assert Confirmation().ratio == 1.0
    assert Confirmation().after(Promise(1.0, 0.5, 0.5), 0.3) == Confirmation()  # uphill: it promised nothing


def test_steps_are_taken_whole_until_noise_shows() -> None:
    size = AdaptiveStep(coarse=15, calm=40)
    assert size.relaxation(10, 0.1) == 1.0
    assert size.relaxation(159, 1.0) == 1.0
    assert size.relaxation(159, 0.8) == 0.8
    assert size.relaxation(159, 0.1) == pytest.approx(0.5)
    assert size.relaxation(159, -3.0) == pytest.approx(0.5)
    assert AdaptiveStep(calm=None).relaxation(159, 0.1) == 1.0


def test_it_measures_once_a_period() -> None:
    rule = LevenbergMarquardt(period=4)
    assert [step for step in range(1, 13) if rule.due(step)] == [4, 8, 12]


def test_constant_damping_is_constant() -> None:
    rule = ConstantDamping(0.5)
    assert not any(rule.due(step) for step in range(20))
    assert rule.update(0.5, -1.0) == 0.5


def test_damping_from_what_a_user_gives() -> None:
    assert damping_from(0.1, True) == ConstantDamping(0.1)
    assert damping_from(2, False) == ConstantDamping(2.0)
    assert damping_from(None, True) == LevenbergMarquardt()
    assert isinstance(damping_from(None, False), ConstantDamping)
    rule = LevenbergMarquardt(initial=3.0)
    assert damping_from(rule, False) is rule


@given(st.floats(1e-3, 1.0), st.floats(1e-6, 1e6), st.floats(1e-3, 1.0))
def test_the_kl_clip_bounds_the_divergence(lr: float, decrease: float, bound: float) -> None:
    size = FixedStep(lr, kl_clip=bound)
    scale = size.scale(lr, decrease)
    assert 0 < scale <= 1
    assert 0.5 * (lr * scale) ** 2 * decrease <= bound * (1 + 1e-12)
    if 0.5 * lr**2 * decrease <= bound:
        assert scale == 1.0
    assert FixedStep(lr, kl_clip=None).scale(lr, decrease) == 1.0


def test_steps_from_what_a_user_gives() -> None:
    assert step_size_from(None, None) == AdaptiveStep()
    assert step_size_from(None, 0.9) == AdaptiveStep(momentum=0.9)
    assert step_size_from(0.1, None) == FixedStep(0.1)
    assert step_size_from(1, 0.9) == FixedStep(1.0, 0.9)
    size = FixedStep(0.1, kl_clip=None)
    assert step_size_from(size, None) is size


def test_a_tempered_metric_has_steps_and_damping_of_its_own() -> None:
    assert step_size_from(None, None, tempered=True) == AdaptiveStep.tempered()
    assert AdaptiveStep.tempered(0.5).momentum == 0.5
    assert step_size_from(0.1, None, tempered=True) == FixedStep(0.1)
    assert damping_from(None, True, tempered=True) == ConstantDamping(1e-7)
    assert damping_from(0.1, True, tempered=True) == ConstantDamping(0.1)


@pytest.mark.parametrize("taken", [1.0, 0.1])
def test_what_the_next_batch_confirms_is_not_ruled_by_one_tiny_promise(taken: float) -> None:
    steady = Confirmation()
    for _ in range(20):
        steady = steady.after(Promise(slope=-1.0, curvature=0.0, taken=taken), slope=-0.1 * taken)
    assert steady.ratio == pytest.approx(0.1)
    odd = steady.after(Promise(slope=-1e-9, curvature=0.0, taken=taken), slope=-0.1)
    assert odd.ratio == pytest.approx(0.1 + 0.1 * (1 - 0.1))
    assert steady.after(Promise(slope=-1e-9, curvature=0.0, taken=taken), slope=0.1).ratio < 0.1


def one_direction(slope: float, curvature: float) -> QuadraticModel:
    return QuadraticModel(
        1.0,
        torch.tensor([slope, 0.1], dtype=DTYPE),
        torch.tensor([[curvature, 0.0], [0.0, 1.0]], dtype=DTYPE),
        torch.zeros(2, 2, dtype=DTYPE),
    )


def test_coefficients_minimise_the_model_unless_momentum_is_fixed() -> None:
    model = one_direction(-1.0, 2.0)
    assert torch.equal(AdaptiveStep().coefficients(model, 1, None), model.minimise())
    assert torch.equal(AdaptiveStep(momentum=0.5).coefficients(model, 1, None), model.minimise({1: 0.5}))
    assert torch.equal(AdaptiveStep(momentum=0.5).coefficients(model, None, None), model.minimise())


def test_alpha_does_not_outgrow_its_average() -> None:
    size, model = AdaptiveStep(growth=1.5), one_direction(-1.0, 2.0)
    assert float(size.coefficients(model, 1, 0.2)[0]) == pytest.approx(0.3)
    assert float(size.coefficients(model, 1, 10.0)[0]) == pytest.approx(0.5, rel=1e-5)
    assert float(size.coefficients(model, 1, -0.1)[0]) > 0  # an average that points uphill bounds nothing


def test_no_step_promises_more_than_the_whole_loss() -> None:
    for slope, curvature, loss in [(-1e3, 1.0, 5.0), (-10.0, 1e-3, 0.2), (-1e8, 1e2, 14.0)]:
        model = QuadraticModel(
            loss,
            torch.tensor([slope, 0.0], dtype=DTYPE),
            torch.diag(torch.tensor([curvature, 1.0], dtype=DTYPE)),
            torch.zeros(2, 2, dtype=DTYPE),
        )
        c = AdaptiveStep().coefficients(model, None, None)
        assert model.change(c) == pytest.approx(-max(loss, 1.0))
        assert 0 < float(c[0]) < -slope / curvature
    modest = one_direction(-1.0, 2.0)
    assert torch.equal(AdaptiveStep().coefficients(modest, 1, None), modest.minimise())


def test_momentum_is_at_most_one() -> None:
    tiny = QuadraticModel(  # the last step was so short that its best multiple is far away
        1.0, torch.tensor([-1.0, -1e-6]).double(), torch.eye(2).double() * 1e-12, torch.zeros(2, 2).double()
    )
    assert abs(float(AdaptiveStep().coefficients(tiny, 1, None)[1])) <= 1.0


def test_the_alarm_rings_for_what_no_batch_explains() -> None:
    alarm = Alarm()
    for k in range(20):
        assert not alarm.rings(100.0 if k < 5 else 1.1)  # too early to tell, or ordinary
        alarm = alarm.after(1.0 + 0.1 * (-1) ** k)
    assert alarm.mean == pytest.approx(1.0, abs=0.05)
    assert alarm.rings(3.0)
    assert not alarm.rings(0.1)
    falling = Alarm()
    for k in range(50):
        assert not falling.rings(0.9**k)
        falling = falling.after(0.9**k)


@pytest.mark.parametrize(
    "build",
    [
        lambda: FixedStep(-0.1),
        lambda: FixedStep(math.nan),
        lambda: FixedStep(math.inf),
        lambda: FixedStep(0.1, momentum=1.0),
        lambda: FixedStep(0.1, kl_clip=0.0),
        lambda: AdaptiveStep(momentum=-0.1),
        lambda: AdaptiveStep(fraction=0.0),
        lambda: AdaptiveStep(fraction=1.5),
        lambda: AdaptiveStep(groups=0),
        lambda: AdaptiveStep(calm=0),
        lambda: ConstantDamping(-1.0),
        lambda: ConstantDamping(math.nan),
        lambda: LevenbergMarquardt(decay=1.0),
        lambda: LevenbergMarquardt(period=0),
        lambda: step_size_from(FixedStep(0.1), 0.9),
        lambda: L2(-1.0),
        lambda: L2(math.inf),
    ],
)
def test_what_is_out_of_range_is_refused(build) -> None:
    with pytest.raises(ConfigError):
        build()
