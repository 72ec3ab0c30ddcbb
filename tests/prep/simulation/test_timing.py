"""Time from work and machines: the slowest resource decides, and more machines never cost more."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmt_prep.simulation.timing import Cluster, Work, time_of

seconds = st.floats(0, 1e9)
works = st.builds(
    Work,
    name=st.just("any"),
    alone=seconds,
    shared=seconds,
    longest=seconds,
    moved=st.floats(0, 1e18),
    startup=st.floats(0, 100),
    is_shared=st.booleans(),
)
rates = st.none() | st.floats(1, 1e12)
clusters = st.builds(Cluster, machines=st.integers(1, 10**5), cores=st.integers(1, 512), disk=rates, network=rates)


@given(works, clusters, st.sampled_from(["machines", "cores"]))
def test_twice_as_many_never_take_longer_once_they_work(work: Work, cluster: Cluster, what: str) -> None:
    more = cluster.model_copy(update={what: 2 * getattr(cluster, what)})
    now, then = time_of(work, cluster), time_of(work, more)
    assert then.seconds - then.startup <= (now.seconds - now.startup) * (1 + 1e-12)


@given(works, clusters, st.sampled_from(["alone", "shared", "longest", "moved"]), st.floats(1, 100))
def test_more_work_is_never_done_sooner(work: Work, cluster: Cluster, what: str, times: float) -> None:
    more = replace(work, **{what: times * getattr(work, what)})
    assert time_of(more, cluster).seconds >= time_of(work, cluster).seconds


@given(works, clusters)
def test_a_stage_waits_for_each_of_its_resources(work: Work, cluster: Cluster) -> None:
    machines, workers = (cluster.machines, cluster.workers) if work.is_shared else (1, 1)
    least = [work.shared / workers, work.longest, work.alone]
    least += [work.moved / (rate * machines) for rate in (cluster.disk, cluster.network) if rate]
    assert time_of(work, cluster).seconds >= max(least)


@pytest.mark.parametrize(
    ("work", "bound_by"),
    [
        (Work("w", shared=800.0, longest=1.0), "cores"),
        (Work("w", shared=8.0, longest=50.0), "longest task"),
        (Work("w", shared=8.0, moved=1e12), "disk"),
        (Work("w", shared=8.0, alone=100.0), "coordinator"),
        (Work("w", shared=8.0, startup=30.0), "start-up"),
        (Work("w", shared=800.0, is_shared=False), "one core"),
    ],
)
def test_the_slowest_resource_is_named(work: Work, bound_by: str) -> None:
    cluster = Cluster(machines=4, cores=2, disk=1e10, network=2e10)
    assert time_of(work, cluster).bound_by == bound_by


def test_an_exact_sum() -> None:
    work = Work("w", alone=3.0, shared=80.0, longest=2.0, moved=1e9, startup=0.5)
    assert time_of(work, Cluster(machines=2, cores=4, disk=1e9)).seconds == 3.0 + 80.0 / 8 + 0.5
