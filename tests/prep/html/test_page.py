"""The page is one closed, repeatable file in which text from data stays text."""

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import small_datasets

from llmt_prep.html import require_page, write_page
from llmt_prep.html.page import page
from llmt_prep.stats import dataset_stats
from llmt_shared.dataset import open_dataset
from llmt_shared.errors import ConfigError

KNOWN = {
    *("html", "head", "meta", "title", "style", "script", "noscript", "body", "header", "main", "footer", "nav"),
    *("section", "article", "details", "summary", "figure", "figcaption", "div", "span", "p", "h1", "h2", "h3"),
    *("dl", "dt", "dd", "ul", "li", "a", "b", "i", "small", "code", "table", "thead", "tbody", "tr", "th", "td"),
}
KNOWN_ATTRIBUTES = {
    *("id", "class", "style", "title", "href", "type", "role", "scope", "lang", "charset", "name", "content", "open"),
    *("http-equiv", "aria-label", "aria-hidden"),
}


class Outline(HTMLParser):
    """Elements, attributes and text of a page; scripts and their kinds apart."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.scripts = "", []
        self._in = ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._in = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        del tag
        self._in = ""

    def handle_data(self, data):
        if self._in == "script":
            self.scripts[-1] += data
        elif self._in != "style":
            self.text += data


def made(path: Path) -> str:
    dataset = open_dataset(path)
    return page(dataset, dataset_stats(dataset))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_datasets.build(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def source(small: Path) -> str:
    return made(small)


@pytest.fixture(scope="module")
def attacked(hostile: Path) -> Outline:
    return Outline(made(hostile))


def test_the_same_dataset_gives_the_same_bytes(small, source, tmp_path):
    dataset = open_dataset(small)
    write_page(dataset, dataset_stats(dataset), tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text("utf-8") == source


def test_nothing_on_the_page_is_loaded_from_elsewhere(source):
    for tag, attributes in Outline(source).elements:
        assert tag not in ("link", "iframe", "img", "base", "object", "embed", "form")
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")


def test_the_policy_allows_the_two_scripts_of_the_page_and_nothing_else(source):
    outline = Outline(source)
    policy = next(each["content"] for tag, each in outline.elements if each.get("http-equiv"))
    kinds = [attributes.get("type") for tag, attributes in outline.elements if tag == "script"]
    run = [text for text, kind in zip(outline.scripts, kinds, strict=True) if kind is None]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in run]
    assert policy.split("; ") == [
        "default-src 'none'", "style-src 'unsafe-inline'", f"script-src 'sha256-{hashes[0]}' 'sha256-{hashes[1]}'",
        "base-uri 'none'", "form-action 'none'",
    ]  # fmt: skip


def test_the_policy_comes_before_all_that_it_governs(source):
    tags = [tag for tag, _ in Outline(source).elements]
    assert tags[:4] == ["html", "head", "meta", "meta"]


def test_text_from_data_makes_no_element_and_no_attribute(attacked):
    assert {tag for tag, _ in attacked.elements} <= KNOWN
    assert {name for _, attributes in attacked.elements for name in attributes} <= KNOWN_ATTRIBUTES
    assert sum(tag == "script" for tag, _ in attacked.elements) == 2 + 4  # plotly, ours, and a figure each


def test_text_from_data_is_shown_as_it_is(attacked):
    for wanted in ("<script>window.broken = 1</script>", "&lt;b&gt; &#60;i&#62;", "{{ 7 * 7 }}", "\\x00\\x07\\x1b[31m"):
        assert wanted in attacked.text
    assert "<img src=x onerror=alert(1)>&\"'.jsonl:" in attacked.text
    assert "\\x1b[31m.parquet row " in attacked.text


def test_no_control_character_is_on_the_page(attacked):
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", attacked.text)


def test_names_of_sources_in_plots_cannot_end_the_script_that_holds_them(attacked):
    figures = [text for text in attacked.scripts if text.startswith("{")]
    assert len(figures) == 4
    assert not re.search("[<>&]", "".join(figures))


def test_head_tells_path_digest_rows_and_fill(small, source):
    dataset = open_dataset(small)
    train = dataset_stats(dataset).splits["train"]
    text = " ".join(Outline(source).text.split())
    assert f"path{small}digest{dataset.digest}" in text.replace(" ", "")
    assert f"{train.rows} rows" in text
    assert f"{100 * train.fill:.2f} % fill" in text


def test_a_ledger_that_does_not_close_is_said_at_the_top(small, source):
    dataset = open_dataset(small)
    stats = dataset_stats(dataset).model_copy(update={"ledger_mistakes": ("web: records: 3 != 1 + 1",)})
    assert "does not close" not in source
    wrong = Outline(page(dataset, stats)).text
    assert "The ledger does not close" in wrong
    assert "web: records: 3 != 1 + 1" in wrong


def test_a_page_inside_the_dataset_is_refused(small):
    with pytest.raises(ConfigError, match="lies inside the dataset"):
        require_page(small, small / "report.html")


def test_a_folder_is_refused(small, tmp_path):
    with pytest.raises(ConfigError, match="is a folder; wanted a file, such as"):
        require_page(small, tmp_path)


def test_a_library_that_is_missing_is_named_with_the_way_to_get_it(small, tmp_path, monkeypatch):
    monkeypatch.setattr("llmt_prep.html.find_spec", lambda name: None if name == "plotly" else object())
    with pytest.raises(ConfigError, match=r"plotly not installed; run: pip install 'llmt\[report\]'"):
        require_page(small, tmp_path / "report.html")


def test_plots_of_many_sources_show_the_largest(small):
    dataset = open_dataset(small)
    stats = dataset_stats(dataset)
    train = stats.splits["train"]
    many = {f"s{number}": next(iter(train.sources.values())) for number in range(250)}
    stats = stats.model_copy(update={"splits": stats.splits | {"train": train.model_copy(update={"sources": many})}})
    text = Outline(page(dataset, stats)).text
    assert text.count("Drawn are the 200 largest of 250.") == 2
    assert "s249" in text
