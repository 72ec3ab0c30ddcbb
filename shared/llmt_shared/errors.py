"""What can go wrong that a user can mend, and the exit code that tells a script which it was."""


class LlmtError(Exception):
    """A failure to show as one message, without a traceback: the place, the value, what was wanted, the way out."""

    exit_code = 1
    is_told = False
    """Whether another process of the same run tells the user; then this one leaves without a word."""


class ConfigError(LlmtError):
    """A config, an argument or an environment that cannot work."""

    exit_code = 2


class FormatError(LlmtError):
    """A dataset, store or checkpoint on disk that is not what its manifest or format says."""

    exit_code = 3


class DataError(LlmtError):
    """Input data that a run cannot go on with: too many bad records, an empty source."""

    exit_code = 1


class StoreError(LlmtError):
    """An object store that gave no right answer for as long as one is waited for."""

    exit_code = 1


class ShortObjectError(StoreError):
    """An object that is shorter than what is to be read of it."""


class Stopped(LlmtError):  # noqa: N818  not an error of anybody's: the run was asked to stop and can be resumed
    """The run ended early with its state saved; running the same command again resumes it."""

    exit_code = 4
