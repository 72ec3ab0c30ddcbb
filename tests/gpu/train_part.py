"""Real runs of models like Llama 3 and Phi-3 of about 1e9 parameters, from configs, by `llmt_train.fit`."""

from gpu.fits import sizes_of, try_run
from gpu.record import Report


def run(report: Report, profile: str) -> None:
    """Train both, as a user would first: the defaults."""
    sizes = sizes_of(profile)
    try_run(report, "llama", sizes, sizes.llama)
    try_run(report, "phi3", sizes, sizes.phi)
