"""Exceptions that end a command with an error message instead of a traceback."""


class UserError(Exception):
    """Base class of errors caused by invalid arguments, configs or input files.

    The message contains the invalid value, the expected value and a way to fix the error. Commands
    print the message without a traceback and exit with status 2. The constructor takes a single
    string, so a data loader worker can pickle the exception and send it to the main process.

    Attributes:
        on_all_ranks: True if every process of a job raises the same error. Only the main process
            then prints the message.
        exit_status: Exit status of a command that fails with this error.
    """

    on_all_ranks = False
    exit_status = 2


class RunError(Exception):
    """Failure of a run that was started correctly, such as a full disk or non-finite losses.

    The message describes the failure and how to fix it. Commands print the message without a
    traceback and exit with status 1. Every process of a job raises the same error.
    """

    on_all_ranks = True
    exit_status = 1


def check_choice(name: str, value: object, choices: tuple[str, ...] | dict[str, object]) -> None:
    """Raise a UserError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise UserError(f"{name} is {value!r}; expected one of: {', '.join(choices)}.")
