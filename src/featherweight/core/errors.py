"""Errors that a user can act on: each message is one line that says what is wrong and what to do."""


class FeatherweightError(Exception):
    """Base of every error of this package; the command line prints its message and exits with code 2."""


class TaskError(FeatherweightError):
    """The task (model, data, loss or metric) cannot be used as it is."""


class RecipeError(FeatherweightError):
    """A recipe names something unknown, sets something out of range, or orders steps in a way that cannot work."""


class NoEffect(FeatherweightError):
    """A step left the model as it was."""


class NotFinite(FeatherweightError):
    """A weight, an input or an output became NaN or infinite."""


class NotCarried(FeatherweightError):
    """A target has no form for something that the model stores or computes."""


class ArtifactError(FeatherweightError):
    """An artifact on the disk is damaged, incomplete, or does not do what its model does."""


class MissingExtra(FeatherweightError):
    """A package that is not installed is needed; the message names the extra that installs it."""


class OutputError(FeatherweightError):
    """The output folder cannot be used."""


class Infeasible(FeatherweightError):
    """Nothing met the bar; the message says what came nearest."""
