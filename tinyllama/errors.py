"""The one exception that bad input raises."""


class InputError(ValueError):
    """Bad input: a file, an option or a text that the program cannot use.

    The message is one line that says what and where, what was expected, what was got, and what to do.
    Scripts print it without a traceback and exit with status 2 (`terminal.run`).
    """
