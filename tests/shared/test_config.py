"""Configs: all mistakes at once, each with its line, what was found, what was wanted; YAML 1.2; sizes; overrides."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, TypeAdapter, ValidationError

from llmt_shared.config import Bytes, Count, StrictModel, load_config, parse_count
from llmt_shared.errors import ConfigError


class Inner(StrictModel):
    path: str
    weight: Annotated[float, Field(gt=0)] = 1.0


class Linear(StrictModel):
    type: Literal["linear"]
    warmup: int = 0


class Cosine(StrictModel):
    type: Literal["cosine"]
    floor: float = 0.0


class Bound(StrictModel):
    low: int = 0
    high: int = 1

    @classmethod
    def conflicts(cls, given):
        if given.get("low", 0) > given.get("high", 1):
            yield "high is below low; wanted low <= high"
        if given.get("low") == 7:
            yield "low: 7 is unlucky"
        if given.get("low") == 8:
            yield "no such luck with 8"


class Config(StrictModel):
    seed: int
    some: Literal["all"] | tuple[int, ...] = "all"
    bound: Bound = Bound()
    place: Path | None = None
    mode: Literal["fast", "exact"] = "fast"
    budget: Count = 0
    cache: Bytes = 0
    is_new: bool = False
    name: str | None = None
    rate: float = 0.1
    inner: Inner = Inner(path="x")
    many: dict[str, Inner] = Field(default_factory=dict)
    schedule: Annotated[Linear | Cosine, Field(discriminator="type")] | None = None
    items: tuple[int, ...] = ()


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_config(path, Config, overrides)


def mistakes(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the message, without the folder."""
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text, *overrides)
    return str(error.value).replace(f"{tmp_path}/", "").splitlines()


def test_a_file_becomes_a_value(tmp_path):
    config = load(tmp_path, "seed: 3\ninner: {path: a, weight: 2}\nbudget: 20B\nitems: [1, 2]\n")
    assert config == Config(seed=3, inner=Inner(path="a", weight=2.0), budget=20 * 10**9, items=(1, 2))


def test_all_mistakes_are_told_at_once_with_their_lines(tmp_path):
    found = mistakes(
        tmp_path,
        "seed: many\nmode: quick\ninner:\n  path: 3\n  wieght: 2\nmany:\n  web: {path: x, weight: -1}\nbudgit: 3\n",
    )
    assert [line.split(": ")[:2] for line in sorted(found)] == [
        ["run.yaml:1", "seed"],
        ["run.yaml:2", "mode"],
        ["run.yaml:4", "inner.path"],
        ["run.yaml:5", "inner.wieght"],
        ["run.yaml:7", "many.web.weight"],
        ["run.yaml:8", "budgit"],
    ]


def test_an_unknown_key_names_the_nearest_and_all_others(tmp_path):
    [line] = mistakes(tmp_path, "seed: 1\ninner:\n  path: x\n  wieght: 2\n")
    assert line == "run.yaml:4: inner.wieght: unknown key, did you mean 'weight'?; known here: path, weight"


def test_an_unknown_choice_names_the_choices(tmp_path):
    [line] = mistakes(tmp_path, "seed: 1\nmode: fats\n")
    assert line.startswith("run.yaml:2: mode: 'fats' is not one of fast, exact")
    assert "did you mean 'fast'?" in line


def test_an_unknown_tag_of_a_union_names_the_tags(tmp_path):
    [line] = mistakes(tmp_path, "seed: 1\nschedule: {type: cosin}\n")
    assert line.startswith("run.yaml:2: schedule")
    assert "linear, cosine" in line


def test_a_key_of_another_member_of_a_union_is_told_with_its_line_and_whose_it_is(tmp_path):
    [line] = mistakes(tmp_path, "seed: 1\nschedule:\n  type: cosine\n  warmup: 3\n")
    assert line == "run.yaml:4: schedule.warmup: belongs to `type: linear`; remove `warmup`, or choose that"


def test_what_the_members_of_a_union_wanted_is_one_line(tmp_path):
    assert mistakes(tmp_path, "seed: 1\nsome: al\n") == [
        "run.yaml:2: some: found 'al'; wanted all or a list, did you mean 'all'?"
    ]


def test_the_member_of_a_union_that_came_further_tells_what_is_wrong(tmp_path):
    assert mistakes(tmp_path, "seed: 1\nsome:\n  - 1\n  - x\n") == [
        "run.yaml:4: some.1: found 'x'; wanted a whole number"
    ]


def test_a_key_that_is_misspelt_is_not_missing_too(tmp_path):
    [line] = mistakes(tmp_path, "seed: 1\ninner: {pat: x}\n")
    assert line == "run.yaml:2: inner.pat: unknown key, did you mean 'path'?; known here: path, weight"


def test_a_conflict_is_told_at_the_key_that_it_begins_with(tmp_path):
    text = "seed: 1\nbound:\n  low: {}\n  high: 9\n"
    assert mistakes(tmp_path, text.format(10)) == ["run.yaml:4: bound: high is below low; wanted low <= high"]
    assert mistakes(tmp_path, text.format(7)) == ["run.yaml:3: bound: low: 7 is unlucky"]
    assert mistakes(tmp_path, text.format(8)) == ["run.yaml:2: bound: no such luck with 8"]
    assert mistakes(tmp_path, text.format(1), "bound.high=0") == [
        "command line: bound: high is below low; wanted low <= high"
    ]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("seed: 1.5", "a whole number"),
        ("rate: x", "a number"),
        ("is_new: 2", "true or false"),
        ("name: 3", "text"),
        ("items: 3", "a list"),
        ("inner: 3", "keys and values"),
        ("rate: [1]", "a number"),
    ],
)
def test_what_was_wanted_is_told_in_plain_words(tmp_path, line, wanted):
    text = line if line.startswith("seed") else f"seed: 1\n{line}"
    assert mistakes(tmp_path, text)[0].endswith(f"; wanted {wanted}")


def test_a_missing_key_is_told_at_its_parent(tmp_path):
    assert mistakes(tmp_path, "mode: fast\ninner:\n  weight: 2\n") == [
        "run.yaml:1: seed: missing; it is required",
        "run.yaml:2: inner.path: missing; it is required",
    ]


def test_a_wrong_item_of_a_list_is_told_with_its_line(tmp_path):
    [line] = mistakes(tmp_path, "seed: 1\nitems:\n  - 1\n  - x\n")
    assert line.startswith("run.yaml:4: items.1: found 'x'; wanted")


@pytest.mark.parametrize(
    ("text", "line"),
    [("seed: 1\nmode: fast\nseed: 2\n", 3), ("seed: [1\n", 2), ("seed: 1\n\tmode: fast\n", 2), ("a: b: c\n", 1)],
)
def test_broken_yaml_and_repeated_keys_are_told_with_their_line(tmp_path, text, line):
    [message] = mistakes(tmp_path, text)
    assert message.startswith(f"run.yaml:{line}: not valid YAML")


@pytest.mark.parametrize("text", ["", "# nothing\n", "- 1\n", "just text\n", "3\n"])
def test_a_file_without_keys_is_told(tmp_path, text):
    [message] = mistakes(tmp_path, text)
    assert message.startswith("run.yaml:1: the ")


@pytest.mark.parametrize("word", ["no", "on", "yes", "off", "y", "NO"])
def test_yaml_1_2_has_no_other_words_for_true_and_false(tmp_path, word):
    assert load(tmp_path, f"seed: 1\nname: {word}\n").name == word
    assert mistakes(tmp_path, f"seed: 1\nname: x\nitems: {word}\n")[0].startswith("run.yaml:3: items: ")


@pytest.mark.parametrize(
    ("text", "value"), [("1e-5", 1e-5), ("1E3", 1000.0), (".5", 0.5), ("3", 3.0), ("1.0e-05", 1e-5)]
)
def test_numbers_are_read_as_yaml_1_2_says(tmp_path, text, value):
    assert load(tmp_path, f"seed: 1\nrate: {text}\n").rate == value


def test_nothing_in_a_file_can_name_a_class(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seed: 1\nname: !!python/object/apply:os.system ['touch owned']\n")
    with pytest.raises(ConfigError):
        load_config(path, Config)


def test_a_file_that_is_not_there_a_folder_and_bytes_are_told(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    for name, message in (("no.yaml", "no such config file"), ("", "is a folder"), ("bytes.yaml", "not UTF-8")):
        with pytest.raises(ConfigError, match=message):
            load_config(tmp_path / name, Config)


def test_overrides_win_and_make_what_is_missing(tmp_path):
    config = load(tmp_path, "seed: 1\n", "seed=2", "inner.path=y", "many.web.path=z", "rate=3e-4", "items=[1, 2]")
    assert (config.seed, config.inner.path, config.many["web"].path, config.rate) == (2, "y", "z", 3e-4)
    assert config.items == (1, 2)


def test_an_override_may_hold_equals_signs_and_nothing(tmp_path):
    assert load(tmp_path, "seed: 1\nname: a\n", "name=a=b").name == "a=b"
    assert load(tmp_path, "seed: 1\nname: a\n", "name=").name is None


def test_a_mistake_in_an_override_is_told_as_such(tmp_path):
    [line] = mistakes(tmp_path, "seed: 1\n", "rate=fast")
    assert line.startswith("command line: rate: found 'fast'; wanted")


@pytest.mark.parametrize("override", ["seed", "=3", "a..b=3", ".a=1"])
def test_what_is_no_override_is_told(tmp_path, override):
    [line] = mistakes(tmp_path, "seed: 1\n", override)
    assert "is not an override; wanted key.sub=value" in line


def test_a_path_that_is_none_is_told(tmp_path):
    assert mistakes(tmp_path, "seed: 1\nplace: 5\n") == ["run.yaml:2: place: found 5; wanted path"]


def test_an_override_below_a_value_is_told(tmp_path):
    [line] = mistakes(tmp_path, "seed: 1\n", "seed.sub=2")
    assert line.startswith("command line: seed.sub: 'seed' is a ")


@pytest.mark.parametrize("value", ["[1", "2024-99-99"])
def test_an_override_that_is_no_yaml_is_told(tmp_path, value):
    [line] = mistakes(tmp_path, "seed: 1\n", f"name={value}")
    assert line.startswith("command line: name: ")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("20B", 20 * 10**9), ("300M", 3 * 10**8), ("1.5K", 1500), ("4096", 4096), (4096, 4096), (1e9, 10**9),
        ("2T", 2 * 10**12), ("1_000", 1000), ("1e6", 10**6), ("3k", 3000), (" 7 ", 7), (0, 0),
        ("9007199254740993", 9007199254740993),
    ],
)  # fmt: skip
def test_counts_have_units(text, value):
    assert parse_count(text) == value


@pytest.mark.parametrize("text", ["B", "", "-1", -1, 1.5, "1.0001K", "20 apples", True, None, "nan", "1e400", [1]])
def test_what_is_no_whole_number_is_refused(text):
    with pytest.raises(ValueError, match="wanted"):
        parse_count(text)


@pytest.mark.parametrize(
    ("text", "value"), [("512MB", 512 * 10**6), ("512MiB", 512 * 2**20), ("1.5GB", 1_500_000_000), ("8B", 8), (7, 7)]
)
def test_bytes_have_units(text, value):
    assert TypeAdapter(Bytes).validate_python(text) == value


@given(st.integers(0, 2**62), st.sampled_from(["", "K", "M", "B", "T"]))
def test_a_count_is_exact(number, unit):
    assert parse_count(f"{number}{unit}") == number * {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}[unit]


def test_a_config_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Config(seed=1).seed = 2
