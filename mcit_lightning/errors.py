"""Errors of other libraries, as a part of a message of our own."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its type if it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
