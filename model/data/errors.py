"""The one error that this package raises for bad input, so that a script can catch it and print one line."""


class DataError(ValueError):
    """A source, store, sampler or curriculum that cannot be used. The message is one line that names the culprit."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of any exception on one line of at most `limit` characters (its type's name when it has none)."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
