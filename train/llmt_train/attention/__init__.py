"""Causal attention inside the segments of a packed row: one function, several backends, a door to transformers."""

from llmt_train.attention.choose import (
    BACKENDS,
    OPTIONAL_MODULES,
    Call,
    Machine,
    choose,
    machine_of,
    refusal,
    varlen_attention,
)
from llmt_train.attention.segments import Backend, Options, Segments
from llmt_train.attention.transformers_hook import NAME, register

__all__ = [
    "BACKENDS",
    "NAME",
    "OPTIONAL_MODULES",
    "Backend",
    "Call",
    "Machine",
    "Options",
    "Segments",
    "choose",
    "machine_of",
    "refusal",
    "register",
    "varlen_attention",
]
