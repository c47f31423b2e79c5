"""The one kind of error a user can mend."""


class UserError(Exception):
    """Bad input. The message is one sentence that names the value, the limit and the flag or key that helps;
    commands print it as `error: ...` and exit with 1."""
