"""What packing a corpus of another size, on other machines, would give and take: `pack --dry-run --simulate`.

A sample of the mix's own sources goes through the real code with the clock running; the rest is arithmetic. Nothing is
written but in a temporary directory.
"""

from llmt_prep.simulation.run import Simulation, simulate
from llmt_prep.simulation.settings import Scenario, parse_scenario

__all__ = ["Scenario", "Simulation", "parse_scenario", "simulate"]
