"""Train vision-language-action policies.

Data flows down: stream → data set → policy → loss → checkpoint → export → rollout.
"""

import os

# Read once, when torch starts: threads that spin while they wait take the cores of a busy CPU from those they wait for.
# Steps were 4 times slower (docs/RESULTS.md).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


class InputError(ValueError):
    """Wrong input, told in one line: what was found, what was expected, and the flag or file to change."""


class NotSaved(OSError):
    """A checkpoint that could not be written, without which the run does not go on."""
