"""The errors a user can cause, in one tree.

Each message says what failed, the value that was met, the rule, and the next step. `teachers` and
`students` know nothing of this module: they raise `ValueError`, `FileNotFoundError` and `RuntimeError`.
"""

PREEMPTED = 75
"""Exit status of a run that was told to stop, or had no time left: start it again (EX_TEMPFAIL of sysexits.h)."""

OVERDUE = 76
"""Exit status of a run that was told to stop and did not reach a step boundary within its deadline."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it: 128 and the number of SIGINT."""


class DistillError(Exception):
    """Base of every error this package raises on purpose; the command line prints it without a traceback."""

    exit_code = 1


class ConfigError(DistillError):
    """A configuration key or flag has a value that cannot work."""


class DataError(DistillError):
    """A shard, an index or an image cannot be used."""


class WeightsError(DistillError):
    """A checkpoint is missing, damaged, or does not fit the model."""


class ExportError(DistillError):
    """An export could not be written, or did not reproduce the encoder's features."""


class TrainingError(DistillError):
    """A run cannot go on: its values are not finite, or another of its processes failed."""


class UnfinishedError(DistillError):
    """A run stopped before its end and can be continued.

    Args:
        message: why it stopped, and what continues it.
        exit_code: the command's exit status.
    """

    def __init__(self, message: str, exit_code: int = PREEMPTED) -> None:
        super().__init__(message)
        self.exit_code = exit_code
