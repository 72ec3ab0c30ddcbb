"""A spike is called one, and nothing else is."""

import math

import numpy as np
import pytest

from llmt_train.watch.spikes import LEAST, WINDOW, recent_losses, usual

STEPS = 1500


def spikes(losses: np.ndarray) -> list[int]:
    """Steps that are called spikes, from 1: each by the losses before it."""
    found = []
    for place, loss in enumerate(losses.tolist()):
        before = usual(losses[max(0, place - WINDOW) : place].tolist())
        if before is not None and loss > before.limit:
            found.append(place + 1)
    return found


def noise(seed: int, count: int = STEPS) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(count)


def warm_up(steps: int) -> np.ndarray:
    """A loss that stays, then falls faster and faster as the learning rate rises, then slower and slower."""
    step = np.arange(steps)
    return 2.5 + 8 * np.exp(-(step**2) / (2 * 200.0 * (step + 50)))


NORMAL = {
    "a plateau": 2.5 + 0.02 * noise(0),
    "a warm-up": warm_up(STEPS) + 0.05 * noise(1),
    "a fast fall": 2.5 + 8 * 0.9 ** np.arange(STEPS) + 0.05 * noise(2),
    "epochs": 3.0 - 0.4 * (np.arange(STEPS) // 500) + 0.05 * noise(3),
    "learned by heart": 1e-4 + 1e-5 * np.abs(noise(4)),
    "four pairs a step": np.log1p(np.exp(-np.random.default_rng(5).normal(3, 3, (STEPS, 4)))).mean(1),
    "a slow rise": 2.0 + np.arange(STEPS) / 2000 + 0.02 * noise(6),
}


@pytest.mark.parametrize("name", NORMAL)
def test_a_normal_run_has_none(name):
    assert spikes(NORMAL[name]) == []


@pytest.mark.parametrize("name", NORMAL)
@pytest.mark.parametrize("step", [200, 1200])
def test_one_bad_step_is_one_spike(name, step):
    losses = NORMAL[name].copy()
    losses[step - 1] += 8.0
    assert spikes(losses) == [step]


@pytest.mark.parametrize("name", ["a warm-up", "a fast fall"])
def test_a_spike_is_seen_while_the_loss_still_falls(name):
    losses = NORMAL[name].copy()
    losses[LEAST] += 2.0
    assert spikes(losses) == [LEAST + 1]


def test_the_first_loss_that_can_be_a_spike_is_one():
    losses = NORMAL["a plateau"].copy()
    losses[LEAST] = 3.5
    assert spikes(losses) == [LEAST + 1]


def test_a_spike_hides_no_other():
    losses = NORMAL["a plateau"].copy()
    bad = [500, 501, 505, 530, 590]
    losses[np.array(bad) - 1] = [9.0, 8.0, 4.0, 5.0, 3.5]
    assert spikes(losses) == bad


def test_a_loss_that_stays_high_becomes_usual():
    losses = 2.5 + 0.02 * noise(7, 1000)
    losses[500:] += 1.0
    found = spikes(losses)
    assert found[0] == 501
    assert found[-1] <= 501 + 16


def test_with_too_few_losses_nothing_is_usual():
    assert usual([2.0] * (LEAST - 1)) is None
    assert usual([2.0] * LEAST) is not None


@pytest.mark.parametrize("level", [0.0, -0.7])
def test_losses_that_are_not_above_zero_have_no_usual_size(level):
    """Robust DPO's may be negative; a step without pairs has the loss 0 then."""
    assert usual((level + 0.01 * noise(1, 100) - 0.05).tolist()) is None


def test_the_limit_of_a_normal_loss_is_ten_standard_deviations():
    """On average over many windows: seven times those of a difference of two."""
    found = [usual((2.5 + 0.1 * noise(seed, WINDOW)).tolist()) for seed in range(300)]
    assert np.mean([each.loss for each in found]) == pytest.approx(2.5, abs=0.01)
    assert np.mean([each.limit for each in found]) == pytest.approx(2.5 + 7 * 0.1 * math.sqrt(2), abs=0.02)


def test_a_steady_fall_raises_no_limit():
    falling = 9.0 - 0.02 * np.arange(WINDOW) + 0.1 * noise(11, WINDOW)
    level = falling[-1] + 0.1 * noise(11, WINDOW)
    width = [usual(each.tolist()).limit - usual(each.tolist()).loss for each in (falling, level)]
    assert width[0] == pytest.approx(width[1], rel=0.15)


def test_only_the_newest_losses_count():
    losses = (2.5 + 0.1 * noise(9, WINDOW)).tolist()
    assert usual([50.0] * WINDOW + losses) == usual(losses)


def test_a_resumed_run_finds_the_losses_that_matter():
    losses = (2.5 + 0.1 * noise(10, 2 * WINDOW)).tolist()
    records = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    records.insert(3, {"step": 3, "eval": {"loss": 99.0}})
    assert recent_losses(records) == losses[-WINDOW:]
    assert usual(recent_losses(records)) == usual(losses)


def test_an_infinite_loss_is_above_any_limit():
    found = usual([2.5] * LEAST)
    assert found is not None
    assert math.inf > found.limit > 2.5
