"""A dataset as one HTML page that asks nothing of a network: plots, tables, sample rows.

plotly draws; nothing else here knows of it but `plots` and `page`. Jinja's autoescaping fills the page, so that text
from data stays text.
"""

from importlib.util import find_spec
from pathlib import Path

from llmt_prep.stats import Stats
from llmt_shared import durable
from llmt_shared.dataset import Dataset
from llmt_shared.errors import ConfigError
from llmt_shared.objects import Location


def require_page(dataset: Location, target: Path) -> None:
    """Find out before a long count whether the page could be written.

    Raises:
        ConfigError: a library is missing, or the target is a folder or lies inside the dataset.
    """
    missing = [name for name in ("jinja2", "plotly") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"--html: {' and '.join(missing)} not installed; run: pip install 'llmt[report]'")
    if target.is_dir():
        raise ConfigError(f"--html: {target} is a folder; wanted a file, such as {target / 'report.html'}")
    if isinstance(dataset, Path) and target.resolve().is_relative_to(dataset.resolve()):
        raise ConfigError(
            f"--html: {target} lies inside the dataset, whose files are sealed; name one outside {dataset}"
        )


def write_page(dataset: Dataset, stats: Stats, target: Path) -> None:
    """Write the page, whole or not at all; the same dataset under the same path gives the same bytes.

    Raises:
        FormatError: a file of the dataset is damaged.
    """
    from llmt_prep.html.page import page

    durable.write(target, page(dataset, stats))
