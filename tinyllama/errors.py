"""The one exception that bad input raises."""

import re

LONGEST = 1000  # characters of a message; what a file or a user wrote is quoted in it, and can be anything


class InputError(ValueError):
    """Bad input: a file, an option or a text that the program cannot use.

    The message is one line that says what and where, what was expected, what was got, and what to do; its
    middle is left out where it would fill a screen. Scripts print it without a traceback and exit with status
    2 (`terminal.run`).
    """

    def __init__(self, message: str) -> None:
        if len(message) > LONGEST:
            message = re.sub(r"(\S{100})\S{100,}(\S{20})", r"\1…\2", message)
        if len(message) > LONGEST:
            message = f"{message[: LONGEST - 300]} … {message[-290:]}"
        super().__init__(message)
