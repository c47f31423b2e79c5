"""The one kind of error a user can mend, and others in one line."""


class UserError(Exception):
    """Bad input. The message is one sentence that names the value, the limit and the flag or key that helps;
    commands print it as `error: ...` and exit with 1."""


def first_line(e: BaseException) -> str:
    """An error's message in one line, its kind where it has none."""
    return (str(e).strip() or type(e).__name__).splitlines()[0]
