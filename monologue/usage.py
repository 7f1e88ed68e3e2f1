"""Bad use of the command line: what the person at the keyboard can mend, in one sentence."""


class UsageError(ValueError):
    """Options that do not fit together, or values that cannot be."""
