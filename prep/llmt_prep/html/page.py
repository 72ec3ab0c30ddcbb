"""The page itself: the template filled, everything inlined, and a policy that lets nothing else in.

Content-Security-Policy: no request at all, and no script but the two of this page, known by their hashes; so text that
slipped through the escaping could still neither run nor call home.
"""

import base64
import hashlib
import re
from importlib import resources
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from llmt_prep.html.sections import Plot, sections
from llmt_prep.report import count, percent
from llmt_prep.stats import Stats
from llmt_shared.dataset import Dataset
from llmt_shared.objects import Location
from llmt_shared.terminal import escaped


def page(dataset: Dataset, stats: Stats) -> str:
    """Return the whole page about a dataset.

    Raises:
        FormatError: a file of the dataset is damaged.
    """
    scripts = [Markup(get_plotlyjs()), _inlined("page.js")]  # noqa: S704  of this package and of plotly
    loader = PackageLoader("llmt_prep.html", "")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"count": count, "figure": _figure, "unbroken": _unbroken}
    return environment.get_template("page.html").render(
        name=escaped(_name(dataset.path)),
        path=escaped(stats.path),
        stats=stats,
        tiles=_tiles(stats),
        sections=list(sections(dataset, stats)),
        style=_inlined("page.css"),
        scripts=scripts,
        policy=_policy(scripts),
    )


def _tiles(stats: Stats) -> list[tuple[str, str]]:
    """The few numbers that everybody asks for first."""
    train = stats.splits["train"]
    return [
        ("tokens", count(train.tokens)),
        ("of them targets", count(train.targets)),
        ("rows", count(train.rows)),
        ("row length", count(stats.length)),
        ("fill", percent(train.fill)),
        ("segments", count(train.segments)),
        ("documents", count(train.documents)),
        ("sources" if len(train.sources) > 1 else "source", count(len(train.sources))),
    ]


def _policy(scripts: list[Markup]) -> str:
    """Styles are free, for plotly sets them on what it draws; they can load nothing."""
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts)
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src {hashes}; base-uri 'none'; form-action 'none'"


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _figure(plot: Plot) -> Markup:
    """A figure as JSON that can stand in a script element: nothing in it can end one."""
    text: str = plot.figure.to_json(engine="json")
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704


def _unbroken(text: str) -> str:
    """Text in which no line ends inside a number or before its %."""
    return re.sub(r"(?<=\d) (?=[\d%])", "\u00a0", text)


def _inlined(name: str) -> Markup:
    return Markup(resources.files("llmt_prep.html").joinpath(name).read_text("utf-8"))  # noqa: S704


def _name(dataset: Location) -> str:
    return dataset.resolve().name if isinstance(dataset, Path) else dataset.name
