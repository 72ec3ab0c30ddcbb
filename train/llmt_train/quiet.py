"""Silence for what libraries say to their own users and not to ours."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

_MEANT_FOR_OTHERS = (
    r"You defined a `validation_step` but have no `val_dataloader`",  # evaluation is ours: see callbacks
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's use of torch
    r"The .grad attribute of a Tensor that is not a leaf",  # torch's compiler looks at it
    r"The `srun` command is available on your system",  # one process, started by whoever wants to
)
_LEVELS = {
    "lightning.pytorch": logging.WARNING,
    "lightning.fabric": logging.WARNING,
    "torch.distributed.tensor._redistribute": logging.ERROR,  # a norm is added up axis by axis; it is one number
}


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Switch off transformers' own progress bars and remarks below errors; ours say what matters."""
    had_bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Drop Lightning's tips and remarks on its own settings, and torch's on how it adds up."""
    levels = {logging.getLogger(name): level for name, level in _LEVELS.items()}
    before = {logger: logger.level for logger in levels}
    with warnings.catch_warnings():
        for message in _MEANT_FOR_OTHERS:
            warnings.filterwarnings("ignore", message)
        for logger, level in levels.items():
            logger.setLevel(level)
        try:
            yield
        finally:
            for logger, level in before.items():
                logger.setLevel(level)
