"""The errors a user can cause, in one tree.

Each message says what failed, the value that was met, the rule, and the next step. `teachers` and
`students` know nothing of this module: they raise `ValueError`, `FileNotFoundError` and `RuntimeError`.
"""


class DistillError(Exception):
    """Base of every error this package raises on purpose; the command line prints it without a traceback."""


class ConfigError(DistillError):
    """A configuration key or flag has a value that cannot work."""


class DataError(DistillError):
    """A shard, an index or an image cannot be used."""


class WeightsError(DistillError):
    """A checkpoint is missing, damaged, or does not fit the model."""


class ExportError(DistillError):
    """An export could not be written, or did not reproduce the encoder's features."""
