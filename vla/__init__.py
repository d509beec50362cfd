"""Train vision-language-action policies exactly: data flows stream → dataset → policy → loss → checkpoint → export →
rollout.
"""


class InputError(ValueError):
    """Wrong input, told in one line: what was found, what was expected, and the flag or file to change."""
