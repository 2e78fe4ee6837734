"""The exception for what cannot become an operator."""


class Refused(Exception):
    """A site stays as it is; the message is the reason, in one sentence that a user can act on."""
