"""What ends a command with a message in place of a traceback."""


class UserError(Exception):
    """A mistake in what was asked for, or a file that is not what it should be.

    The message says what was found, what was expected, and what to do. Every error of this kind
    that the project raises derives from this class; the command lines print its message without
    a traceback and exit with status 2. Takes one string, so that it survives the trip from a data
    loader's worker process.

    Attributes:
        on_all_ranks: whether every process of a job raises the same, so that one need say it.
        exit_status: of a command that it ends.
    """

    on_all_ranks = False
    exit_status = 2


class RunError(Exception):
    """A run that can't go on, through no mistake in how it was started.

    The message says what happened and what to do. The command lines print it without a traceback
    and exit with status 1. Every process of a job raises the same.
    """

    on_all_ranks = True
    exit_status = 1


def check_choice(name: str, value: object, choices: tuple[str, ...] | dict[str, object]) -> None:
    """Raise UserError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise UserError(f"{name} is {value!r}, expected one of: {', '.join(choices)}.")
