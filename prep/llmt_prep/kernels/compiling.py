"""Compiling with numba, once for each machine where the result can be kept."""

from numba import njit


def compiled(function):
    """Compile a function; the result is cached beside its file, else in the user's cache folder."""
    try:
        return njit(cache=True)(function)
    except RuntimeError:  # neither can be written (a read-only container): compile again in every process
        return njit(function)
