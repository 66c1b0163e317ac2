"""Names what a user can cause: each UserError becomes one line on rank 0 and exit code 2."""


class UserError(ValueError):
    """A mistake in what the user gave; the message names the file, the row, the value, the rule and the remedy."""


class ConfigError(UserError):
    """A key, value or combination in YAML, on the command line or in a DeepSpeed JSON file."""


class CutOff(ConfigError):
    """A rank that cannot reach rank 0 and has to speak for itself."""


class DataError(UserError):
    """A file or row of the user's data."""


class ModelError(UserError):
    """A model or tokenizer folder that cannot be used."""


class TrainingError(RuntimeError):
    """The run cannot go on, on all ranks alike; the last checkpoint stays."""
