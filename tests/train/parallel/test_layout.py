"""The arrangement of processes over the axes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmt_shared.errors import ConfigError
from llmt_train.config import ParallelConfig
from llmt_train.parallel.layout import Layout, layout_of, place_of, rank_of

layouts = st.builds(Layout, *[st.integers(1, 4)] * 4)


@given(layouts)
def test_every_rank_has_a_place_of_its_own(layout: Layout):
    places = [place_of(layout, rank) for rank in range(layout.world)]
    assert [rank_of(layout, place) for place in places] == list(range(layout.world))


@given(layouts)
def test_ranks_that_share_layers_are_neighbours(layout: Layout):
    first = [place_of(layout, rank) for rank in range(layout.tp)]
    assert [place.tp for place in first] == list(range(layout.tp))


def test_auto_takes_all_processes():
    assert layout_of(ParallelConfig(tp=2, cp=2), 8) == Layout(1, 2, 2, 2)


def test_copies_are_made_of_groups():
    assert layout_of(ParallelConfig(dp=4, replicate=2), 4) == Layout(2, 2, 1, 1)


@pytest.mark.parametrize(
    ("config", "world", "wanted"),
    [
        (ParallelConfig(tp=3), 4, "a multiple of 3"),
        (ParallelConfig(tp=2), 1, "a multiple of 2"),
        (ParallelConfig(dp=2, tp=2), 6, "4 processes, or `dp: auto`"),
        (ParallelConfig(replicate=3), 4, "3 does not divide dp, which is 4"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(config: ParallelConfig, world: int, wanted: str):
    with pytest.raises(ConfigError, match=wanted):
        layout_of(config, world)
