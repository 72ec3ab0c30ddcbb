"""The smallest change of each kind after which a run fits."""

import pytest

from llmt_shared.errors import ConfigError
from llmt_train.check.estimate import Memory
from llmt_train.check.remedies import Change, remedies
from llmt_train.config import RunConfig
from llmt_train.parallel.layout import Layout

KEPT = {"none": 100, "selective": 40, "attention": 20, "full": 10}


def config(precision: str = "bf16", micro_rows: int = 8, checkpointing="none") -> RunConfig:
    return RunConfig.model_validate(
        {
            "task": "pretrain",
            "model": "x",
            "data": "data",
            "output": "run",
            "batch": {"tokens": 1024, "micro_rows": micro_rows},
            "train": {"steps": 1, "checkpointing": checkpointing},
            "optim": {"lr": 1e-3},
            "precision": precision,
        }
    )


def needs(run: RunConfig) -> Memory:
    """1000 of weights and 100 for each row, less where it is computed again; half of all in bf16-true."""
    half = 2 if run.precision == "bf16-true" else 1
    cast = 1 if run.precision == "fp32" else 2
    kept = run.batch.micro_rows * KEPT[run.train.checkpointing.policy] // cast
    return Memory(1000 // half, 0, 0, 0, kept, 0, 0, 0)


def found(run: RunConfig, limit: float) -> list[tuple[str, int]]:
    return [tuple(change) for change in remedies(run, needs(run), needs, limit)]


def test_each_kind_gives_its_smallest_change():
    assert found(config("fp32"), 1450) == [
        ("batch.micro_rows: 4", 1400),
        ("train.checkpointing: selective", 1320),
        ("precision: bf16", 1400),
    ]


def test_a_ladder_is_climbed_until_it_fits():
    assert found(config(), 1060) == [
        ("batch.micro_rows: 1", 1050),
        ("train.checkpointing: full", 1040),
        ("precision: bf16-true", 900),
    ]


def test_where_the_weights_alone_are_too_large_rows_are_not_tried():
    tried: list[RunConfig] = []

    def noted(run: RunConfig) -> Memory:
        tried.append(run)
        return needs(run)

    assert remedies(config(), needs(config()), noted, 950) == [Change("precision: bf16-true", 900)]
    assert {run.batch.micro_rows for run in tried} == {8}


def test_where_no_single_change_is_enough_all_are_made():
    assert found(config("fp32", micro_rows=1), 1015) == [
        ("train.checkpointing: full", 1010),
        ("precision: bf16-true", 550),
    ]
    assert found(config(), 600) == [
        ("batch.micro_rows: 1, train.checkpointing: full, precision: bf16-true", 505),
    ]


@pytest.mark.parametrize("limit", [0, 500])
def test_where_nothing_is_enough_there_is_none(limit):
    assert found(config(), limit) == []


def test_layers_that_are_computed_again_already_are_not_offered_again():
    run = config(checkpointing={"policy": "selective", "every": 2})
    assert found(run, 1165)[1][0] == "train.checkpointing: selective"
    run = config(checkpointing="full", micro_rows=2)
    assert [setting for setting, _ in found(run, 1005)] == ["batch.micro_rows: 1", "precision: bf16-true"]


def over_devices(run: RunConfig) -> Memory:
    """1000 of weights in parts, 200 for a micro-batch that tp shares; offload leaves that alone."""
    parallel = run.parallel
    if parallel.tp > 2:
        raise ConfigError("no more heads")
    dp = 1 if parallel.dp == "auto" else parallel.dp
    return Memory(0 if parallel.offload else 1000 // (dp * parallel.tp), 0, 0, 0, 200 // parallel.tp, 0, 0, 0)


@pytest.mark.parametrize(
    ("layout", "limit", "wanted"),
    [
        (Layout(), 700, ["parallel.tp: 2 on 2 devices", "parallel.dp: 2 (2 devices)", "parallel.offload: true"]),
        (Layout(), 300, ["parallel.dp: 16 (16 devices)", "parallel.offload: true"]),
        (Layout(), 210, ["parallel.offload: true"]),
        (Layout(), 150, []),
    ],
)
def test_more_devices_are_offered_where_they_are_enough(layout, limit, wanted):
    run = config(checkpointing="full", micro_rows=1, precision="bf16-true")
    changes = remedies(run, over_devices(run), over_devices, limit, layout)
    assert [change.setting for change in changes] == wanted


def test_devices_that_read_other_rows_may_share_layers_instead():
    run = config(checkpointing="full", micro_rows=1, precision="bf16-true")
    [tp, *_] = remedies(run, Memory(500, 0, 0, 0, 200, 0, 0, 0), over_devices, 650, Layout(shard=2))
    assert tp == Change("parallel.tp: 2", 600)
