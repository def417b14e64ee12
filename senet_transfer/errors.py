"""The errors that a user's mistake or file can cause."""


class UserError(Exception):
    """A mistake in what was asked for, or a file that is not what it should be.

    The message says what was found, what was expected, and what to do. Every error of this kind
    that the project raises derives from this class; the command lines print its message without
    a traceback and exit with status 2. Takes one string, so that it survives the trip from a data
    loader's worker process.

    Attributes:
        on_all_ranks: whether every process of a job raises the same, so that one need say it.
    """

    on_all_ranks = False
