"""Train vision-language-action policies.

Data flows down: stream → data set → policy → loss → checkpoint → export → rollout.
"""


class InputError(ValueError):
    """Wrong input, told in one line: what was found, what was expected, and the flag or file to change."""


class NotSaved(OSError):
    """A checkpoint that could not be written, without which the run does not go on."""
