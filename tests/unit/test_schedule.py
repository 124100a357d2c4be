"""The learning rate, the window and the draws are pure functions with known values."""

import collections
import itertools
import math
from collections.abc import Sequence
from typing import Any, get_args

import pytest
import torch

from kd_core.kernels.softmax_kl import softmax_kl
from kd_core.losses.distillation import mean_teacher_logits
from kd_core.teachers.flags import DistillFlags
from kd_core.teachers.samplers import Sampler, draw_teachers
from kd_core.teachers.window import closed, mix, turn
from kd_core.training.schedules import linear_warmup_cosine, linear_warmup_decay


def test_learning_rate_rises_over_the_warmup_and_falls_to_the_floor() -> None:
    factors = [linear_warmup_decay(step, 100, warmup_fraction=0.1, floor=0.02) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == 1.0
    assert factors[-1] == pytest.approx(0.02)
    assert all(a < b for a, b in itertools.pairwise(factors[:10]))
    assert all(a > b for a, b in itertools.pairwise(factors[9:]))


def test_a_cosine_falls_to_zero_after_the_warmup() -> None:
    factors = [linear_warmup_cosine(step, 100, warmup_fraction=0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert factors[10] == 1.0 and factors[55] == pytest.approx(0.5) and 0 < factors[-1] < 1e-3
    assert all(a > b for a, b in itertools.pairwise(factors[10:]))


@pytest.mark.parametrize("schedule", [linear_warmup_decay, linear_warmup_cosine])
def test_the_rate_stays_at_its_peak_until_the_last_share_of_the_steps(schedule: Any) -> None:
    factors = [schedule(step, 100, warmup_fraction=0.1, decay_fraction=0.3) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * i for i in range(1, 11)]) and set(factors[9:70]) == {1.0}
    assert all(a > b for a, b in itertools.pairwise(factors[70:])) and factors[-1] < 0.01
    assert {schedule(step, 100, warmup_fraction=0, decay_fraction=0) for step in range(100)} == {1.0}
    late = [schedule(step, 100, warmup_fraction=0.9, decay_fraction=0.5) for step in range(100)]
    assert late == [schedule(step, 100, warmup_fraction=0.9) for step in range(100)], "it falls behind the warm-up"


def test_warmup_scales_with_the_run() -> None:
    assert linear_warmup_decay(5, 100, warmup_fraction=0.06) == linear_warmup_decay(59, 1000, warmup_fraction=0.06) == 1


def flags(**changed: Any) -> DistillFlags:
    return DistillFlags(teachers=("a", "b", "c"), **{"steps": 100, "kd_ratio": 0.9} | changed)


@pytest.mark.parametrize(
    ("start", "stop", "inside"),
    [(0.0, 0.35, range(0, 35)), (0.2, 0.55, range(20, 55)), (0.285, 0.5, range(29, 50)), (0, 0, ())],
)
def test_window_holds_exactly_its_steps(start: float, stop: float, inside: range) -> None:
    cfg = flags(kd_start=start, kd_stop=stop, label_weight_outside=0.7)
    steps = [mix(cfg, step) for step in range(100)]
    assert [step for step, now in enumerate(steps) if now.kd_ratio] == list(inside)
    assert {(now.kd_ratio, now.label_weight) for now in steps} <= {(0.0, 0.7), (0.9, 1 - 0.9)}
    for step in range(100):
        assert closed(cfg, step) == (step >= round(stop * 100))
    assert all(closed(flags(kd_ratio=0.0), step) for step in range(100))


def test_ramps_join_both_ends_of_the_window() -> None:
    ends = dict(kd_start=0.1, kd_stop=0.6, kd_ratio_stop=0.1, temperature=4.0, temperature_stop=1.0)
    for ramp in ("linear", "cosine"):
        cfg = flags(kd_ramp=ramp, **ends)
        inside = [mix(cfg, step) for step in range(10, 60)]
        assert inside[0][:3] == (0.9, 1 - 0.9, 4.0)
        assert (inside[-1].kd_ratio, inside[-1].temperature) == (pytest.approx(0.1), pytest.approx(1.0))
        assert all(a.kd_ratio > b.kd_ratio and a.temperature > b.temperature for a, b in itertools.pairwise(inside))
        assert mix(cfg, 9).kd_ratio == mix(cfg, 60).kd_ratio == 0
    linear, cosine = (mix(flags(kd_ramp=ramp, **ends), 22).kd_ratio for ramp in ("linear", "cosine"))
    assert linear == pytest.approx(0.9 - 0.8 * 12 / 49)
    assert cosine == pytest.approx(0.9 - 0.8 * (1 - math.cos(math.pi * 12 / 49)) / 2)
    rising = flags(kd_ratio=0.0, kd_ratio_stop=0.8)
    assert (mix(rising, 0).kd_ratio, mix(rising, 0).label_weight) == (0, 1)
    assert mix(rising, 99).kd_ratio == pytest.approx(0.8)
    assert not closed(rising, 0)
    constant = flags(temperature=3.0, temperature_stop=3.0)
    assert {mix(constant, step).temperature for step in range(100)} == {3.0}


def test_every_third_step_distils_and_turns_count_them() -> None:
    cfg = flags(kd_start=0.1, kd_stop=0.5, kd_every=3)
    steps = [mix(cfg, step) for step in range(100)]
    distilling = [step for step, now in enumerate(steps) if now.kd_ratio]
    assert distilling == list(range(10, 50, 3))
    assert [turn(cfg, step) for step in distilling] == [(number, len(distilling)) for number in range(len(distilling))]
    assert turn(cfg, 0) is turn(cfg, 11) is None
    assert steps[11].label_weight == 1


def test_draws_are_a_function_of_seed_and_step_and_uniform() -> None:
    draws = [draw_teachers("uniform", 4, seed=1, step=step) for step in range(4000)]
    assert draws == [draw_teachers("uniform", 4, seed=1, step=step) for step in range(4000)]
    assert draws != [draw_teachers("uniform", 4, seed=2, step=step) for step in range(4000)]
    assert draws[:8] == [(1,), (2,), (2,), (1,), (2,), (3,), (2,), (3,)], "runs of before would not resume"
    counts = collections.Counter(draws)
    assert sorted(counts) == [(0,), (1,), (2,), (3,)]
    assert all(abs(count - 1000) < 150 for count in counts.values())  # 5 standard deviations
    assert draw_teachers("all", 3, seed=1, step=0) == (0, 1, 2)
    pairs = collections.Counter(draw_teachers("uniform", 4, seed=1, step=step, draws=2) for step in range(3000))
    assert sorted(pairs) == list(itertools.combinations(range(4), 2))
    assert all(abs(count - 500) < 102 for count in pairs.values())


def test_weighted_draws_follow_the_weights() -> None:
    draws = [draw_teachers("weighted", 3, seed=1, step=step, weights=(1, 0, 3)) for step in range(4000)]
    counts = collections.Counter(draws)
    assert sorted(counts) == [(0,), (2,)]
    assert abs(counts[0,] - 1000) < 137
    assert draws == [
        draw_teachers("weighted", 3, seed=1, step=step, weights=(5e307, 0, 1.5e308)) for step in range(4000)
    ]


def test_round_robin_gives_every_teacher_its_turn() -> None:
    turns = [draw_teachers("round_robin", 3, seed=1, step=0, turn=turn, draws=2) for turn in range(3)]
    assert turns == [(0, 1), (0, 2), (1, 2)]


def test_curriculum_goes_from_weak_to_strong_in_equal_parts() -> None:
    kwargs: dict[str, Any] = dict(seed=1, step=0, weights=(3, 1, 2), turns=30)
    one = [draw_teachers("curriculum", 3, turn=turn, **kwargs) for turn in range(30)]
    assert one == [(1,)] * 10 + [(2,)] * 10 + [(0,)] * 10
    two = [draw_teachers("curriculum", 3, turn=turn, draws=2, **kwargs) for turn in range(30)]
    assert two == [(1, 2)] * 15 + [(0, 2)] * 15


def test_ranks_draw_alike_except_per_rank() -> None:
    for sampler in get_args(Sampler):
        kwargs: dict[str, Any] = dict(seed=1, weights=(1, 2, 3, 4), turns=50)
        first, second = (
            [draw_teachers(sampler, 4, step=step, turn=step, rank=rank, **kwargs) for step in range(50)]
            for rank in (0, 1)
        )
        assert (first == second) == (sampler != "per_rank"), sampler


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_expected_gradient_of_a_draw_is_that_of_the_mean_of_probabilities_for_forward_kl(temperature: float) -> None:
    torch.manual_seed(0)
    teachers = [torch.randn(6, 9, dtype=torch.float64) for _ in range(4)]
    student = torch.randn(6, 9, dtype=torch.float64)

    def gradient(drawn: Sequence[int], direction: str) -> torch.Tensor:
        logits = student.clone().requires_grad_()
        teacher = mean_teacher_logits([teachers[index].float() for index in drawn], temperature).double()
        kd_N, _ = softmax_kl(logits, teacher, temperature=temperature, direction=direction, impl="reference")
        return torch.autograd.grad(kd_N.sum(), logits)[0]

    def error(draws: Sequence[Sequence[int]], direction: str) -> float:
        mean = sum(gradient(drawn, direction) for drawn in draws) / len(draws)
        whole = gradient(range(4), direction)
        return float((mean - whole).norm() / whole.norm())

    for number in (1, 2, 3):
        assert error(list(itertools.combinations(range(4), number)), "forward") < 1e-5
    assert error([(0,), (1,), (2,), (3,)], "reverse") > 0.05
    sampled = [draw_teachers("uniform", 4, seed=3, step=step) for step in range(1000)]
    assert error(sampled, "forward") < 0.05


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_ensemble_logits_give_the_mean_probabilities(temperature: float) -> None:
    teachers = [torch.randn(5, 7) for _ in range(3)]
    expected = torch.stack([(t / temperature).softmax(-1) for t in teachers]).mean(0)
    ensemble = mean_teacher_logits(teachers, temperature)
    torch.testing.assert_close((ensemble / temperature).softmax(-1), expected)
    assert mean_teacher_logits(teachers[:1], temperature) is teachers[0]
    torch.testing.assert_close(mean_teacher_logits(teachers, temperature, "logits"), torch.stack(teachers).mean(0))
