"""The learning rate, the window and the draws are pure functions with known values."""

import collections
import itertools

import pytest
import torch

from kd_core.losses import mean_teacher_logits
from kd_core.samplers import draw_teachers
from kd_core.schedule import linear_warmup_cosine, linear_warmup_decay, window_closed, window_ratio


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
    assert factors[54] == pytest.approx(0.5) and factors[-1] == pytest.approx(0, abs=1e-12)
    assert all(a > b for a, b in itertools.pairwise(factors[9:]))


def test_warmup_scales_with_the_run() -> None:
    assert linear_warmup_decay(5, 100, warmup_fraction=0.06) == linear_warmup_decay(59, 1000, warmup_fraction=0.06) == 1


@pytest.mark.parametrize(
    ("start", "stop", "inside"), [(0.0, 0.35, range(0, 35)), (0.2, 0.5, range(20, 50)), (0, 0, ())]
)
def test_window_holds_exactly_its_steps(start: float, stop: float, inside: range) -> None:
    ratios = [window_ratio(step, 100, ratio=0.9, start=start, stop=stop) for step in range(100)]
    assert [step for step, ratio in enumerate(ratios) if ratio] == list(inside)
    assert set(ratios) <= {0.0, 0.9}
    for step in range(100):
        assert window_closed(step, 100, stop=stop) == (not any(ratios[step:]) and step >= stop * 100)


def test_draws_are_a_function_of_seed_and_step_and_uniform() -> None:
    draws = [draw_teachers("uniform", 4, seed=1, step=step) for step in range(4000)]
    assert draws == [draw_teachers("uniform", 4, seed=1, step=step) for step in range(4000)]
    assert draws != [draw_teachers("uniform", 4, seed=2, step=step) for step in range(4000)]
    counts = collections.Counter(draws)
    assert sorted(counts) == [(0,), (1,), (2,), (3,)]
    assert all(abs(count - 1000) < 150 for count in counts.values())  # 5 standard deviations
    assert draw_teachers("all", 3, seed=1, step=0) == (0, 1, 2)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_ensemble_logits_give_the_mean_probabilities(temperature: float) -> None:
    teachers = [torch.randn(5, 7) for _ in range(3)]
    expected = torch.stack([(t / temperature).softmax(-1) for t in teachers]).mean(0)
    ensemble = mean_teacher_logits(teachers, temperature)
    torch.testing.assert_close((ensemble / temperature).softmax(-1), expected)
    assert mean_teacher_logits(teachers[:1], temperature) is teachers[0]
