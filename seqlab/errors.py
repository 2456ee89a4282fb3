"""The one exception for things the user can mend."""


class UserError(ValueError):
    """Something the user gave or asked for cannot be used.

    The message is one line: what was seen, what is allowed, what to type next. The command line prints it without
    a traceback and exits with 1.
    """
