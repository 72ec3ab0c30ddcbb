"""The arithmetic of a forecast: what must hold whatever was measured."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_samples import CAPACITY, corpus, mix, rates

from llmt_prep.simulation.forecast import Forecast, contents, predict
from llmt_prep.simulation.settings import Scenario
from llmt_prep.simulation.timing import Cluster
from llmt_shared.errors import ConfigError

TWO = {"web": {"weight": 3}, "code": {"weight": 1}}
BYTES = (40_000_000, 20_000_000)


def forecast(said: dict[str, object], cluster: Cluster | None = None, **changes: object) -> Forecast:
    changes = {"budget": "max", "holdout": {"fraction": 0.01}} | changes
    config = mix(TWO, **changes)
    scenario = Scenario.model_validate(said)
    return predict(config, corpus(*BYTES), rates(list(TWO)), scenario, cluster or Cluster(cores=2))


@settings(max_examples=6)
@given(st.integers(100_000, 10**12), st.floats(1.001, 1000))
def test_more_documents_never_need_less(documents: int, times: float) -> None:
    less, more = (forecast({"documents": count}) for count in (documents, round(times * documents)))
    assert less.seconds <= more.seconds
    assert less.disk.peak <= more.disk.peak
    assert less.memory.machine <= more.memory.machine
    for split in less.splits:
        assert less.splits[split].rows <= more.splits[split].rows


@settings(max_examples=6)
@given(st.integers(10**8, 10**11), st.integers(2, 100))
def test_disk_is_linear_in_documents(documents: int, times: int) -> None:
    """From where what there is once, and the last shard's padding, weigh nothing."""
    one, many = forecast({"documents": documents}).disk, forecast({"documents": times * documents}).disk
    for place in ("input", "cache", "plan", "sidecars", "dataset", "peak", "final"):
        assert getattr(many, place) == pytest.approx(times * getattr(one, place), rel=2e-3), place


@settings(max_examples=6)
@given(st.integers(10**6, 10**11), st.integers(1, 500), st.integers(2, 64))
def test_twice_the_machines_or_cores_never_take_longer_once_they_work(
    documents: int, machines: int, cores: int
) -> None:
    def seconds(cluster: Cluster) -> float:
        found = forecast({"documents": documents}, cluster)
        return found.seconds - sum(stage.startup for stage in found.stages)

    now = seconds(Cluster(machines=machines, cores=cores, disk=1e9))
    assert seconds(Cluster(machines=2 * machines, cores=cores, disk=1e9)) <= now * (1 + 1e-9)
    assert seconds(Cluster(machines=machines, cores=2 * cores, disk=1e9)) <= now * (1 + 1e-9)


@pytest.mark.parametrize("key", ["documents", "bytes", "tokens"])
def test_the_corpus_gets_the_size_asked_for(key: str) -> None:
    found = forecast({key: 10**10})
    assert sum(getattr(source, key) for source in found.sources.values()) == pytest.approx(10**10, rel=1e-6)


def test_sources_keep_their_proportions() -> None:
    now, then = forecast({}), forecast({"documents": 10**10})
    assert now.factor == 1
    assert sum(source.bytes for source in now.sources.values()) == sum(BYTES)
    for name in TWO:
        assert then.sources[name].documents / now.sources[name].documents == pytest.approx(then.factor, rel=1e-4)


def test_weights_share_the_tokens_as_a_plan_does() -> None:
    found = forecast({"documents": 10**9})
    assert found.sources["web"].share == pytest.approx(0.75, rel=1e-4)
    assert max(source.epochs for source in found.sources.values()) == pytest.approx(1, rel=1e-4)


def test_a_budget_in_tokens_grows_with_the_corpus_and_max_stays() -> None:
    fixed = forecast({"documents": 10**9}, budget=2_000_000)
    assert fixed.scaled_settings == ("budget",)
    assert sum(source.got for source in fixed.sources.values()) == pytest.approx(2_000_000 * fixed.factor, rel=1e-3)
    assert forecast({"documents": 10**9}).scaled_settings == ()


def test_an_amount_of_a_source_grows_too() -> None:
    config = mix({"web": {"tokens": 1_000_000}, "code": {"epochs": 2}})
    found = contents(config, corpus(*BYTES), Scenario(bytes=10 * sum(BYTES)))
    assert found.mixture.selections[0].got == pytest.approx(10_000_000, rel=1e-3)
    assert found.mixture.selections[1].epochs == pytest.approx(2)


def test_a_budget_that_the_corpus_cannot_meet_is_refused_as_in_a_plan() -> None:
    with pytest.raises(ConfigError, match="largest feasible budget"):
        forecast({"documents": 10**9}, budget=100_000_000)


def test_held_out_documents_are_rows_of_their_own() -> None:
    found = forecast({"documents": 10**8})
    assert found.splits["validation"].documents == pytest.approx(10**6, rel=1e-3)
    assert "validation" not in forecast({"documents": 10**8}, holdout={"fraction": 0}).splits


def test_rows_hold_the_tokens_that_they_are_said_to() -> None:
    for split in forecast({"documents": 10**8}).splits.values():
        assert split.fill == split.tokens / (split.rows * CAPACITY) <= 1


def test_the_disk_and_the_network_are_limits_where_bytes_move() -> None:
    free, slow, far = (
        forecast({"documents": 10**9}, Cluster(machines=8, cores=32, **limit))
        for limit in ({}, {"disk": 1e8}, {"disk": 1e8, "network": 1e7})
    )
    assert free.seconds < slow.seconds < far.seconds
    for found, rate, bound_by in ((slow, 1e8, "disk"), (far, 1e7, "network")):
        stages = {stage.name: stage for stage in found.stages}
        assert stages["tokenize"].bound_by == bound_by
        assert stages["tokenize"].seconds >= stages["tokenize"].moved / (8 * rate)
