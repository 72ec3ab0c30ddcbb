"""Real runs of models like Llama 3 and Phi-3 of about 1e9 parameters, from configs, by `llmt_train.fit`."""

from gpu.fits import run_folder, sizes_of, steps_of, try_run
from gpu.models import TINY_LLAMA, run_config
from gpu.record import Report, require

_COMPARED = ("loss", "grad_norm")


def run(report: Report, profile: str) -> None:
    """Train both, as a user would first: the defaults. Then a small one twice, for the same bits."""
    sizes = sizes_of(profile)
    try_run(report, "llama", sizes, sizes.llama)
    try_run(report, "phi3", sizes, sizes.phi)
    with report.case("deterministic: twice the same bits"):
        first, second = (_deterministic_run(sizes.length) for _ in range(2))
        require(first == second, f"{_COMPARED} of each step: {first} and {second}")


def _deterministic_run(length: int) -> list[tuple[float, ...]]:
    with run_folder() as folder:
        train = {"steps": 4, "deterministic": True}
        records = steps_of(run_config(TINY_LLAMA, str(folder / "run"), length, 4, 2, train=train))
    return [tuple(record[name] for name in _COMPARED) for record in records]
