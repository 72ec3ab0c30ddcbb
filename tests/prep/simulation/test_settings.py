"""What `--simulate` takes: sizes and rates as people write them, and every mistake at once."""

import pytest

from llmt_prep.simulation.settings import Scenario, parse_rate, parse_scenario
from llmt_shared.errors import ConfigError


def test_every_setting_is_read() -> None:
    asked = parse_scenario("documents=1e10, machines=64,cores=32,disk=2GB/s,network=25Gbit/s,sample=32MB")
    assert asked == Scenario.model_validate(
        {"documents": 10**10, "machines": 64, "cores": 32, "disk": "2GB/s", "network": "25Gbit/s", "sample": 32_000_000}
    )


def test_nothing_is_the_corpus_as_it_is_on_one_machine() -> None:
    asked = parse_scenario("")
    assert (asked.documents, asked.bytes, asked.tokens, asked.machines, asked.cores) == (None, None, None, 1, None)


@pytest.mark.parametrize(
    ("said", "rate"),
    [("2GB/s", 2e9), ("500MB/s", 5e8), ("1.5e3kB/s", 1.5e6), ("8b/s", 1), ("25Gb/s", 3.125e9), ("25Gbit/s", 3.125e9)],
)
def test_bits_are_an_eighth_of_bytes(said: str, rate: float) -> None:
    assert parse_rate(said) == rate


@pytest.mark.parametrize("said", ["2GB", "2 GB per second", "0B/s", "-1GB/s", "1b/s", "fast", 2.0])
def test_what_is_no_rate_is_refused(said: object) -> None:
    with pytest.raises(ValueError, match="wanted"):
        parse_rate(said)


def test_all_mistakes_come_at_once_with_the_nearest_key() -> None:
    text = "documents=abc,machines=0,machnes=3,cores=-1,disk=2GB,foo,network=0B/s,cores=2,bytes=1GB"
    with pytest.raises(ConfigError) as raised:
        parse_scenario(text)
    lines = str(raised.value).splitlines()
    assert all(line.startswith("--simulate: ") for line in lines)
    about = {line.removeprefix("--simulate: ").split(":")[0] for line in lines if not line.startswith("--simulate: '")}
    assert {"documents", "machines", "machnes", "cores", "disk", "network"} <= about
    assert "did you mean 'machines'" in str(raised.value)
    assert "'foo' is not a setting" in str(raised.value)
    assert "cores: said twice" in str(raised.value)
    assert "documents and bytes; a corpus has one size" in str(raised.value)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    "text", ["documents=0", "machines=0", "cores=0.5", "documents=1e400", "tokens=nan", "sample=0"]
)
def test_a_number_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="wanted"):
        parse_scenario(text)
