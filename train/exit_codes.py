"""What ``python -m train`` returns, and what it says beside it.

Beside these codes, 128 + the number of a signal that it obeyed.
"""

FAILED = 1  # a file could not be written; or a fault, and a traceback says which
BAD_INPUT = 2  # the config, the data or the command line is wrong
NOT_FINITE = 3  # the loss or the gradient is not finite
PEER_GONE = 4  # another process of the run is gone
INTERRUPTED = 130


class NotFiniteError(ArithmeticError):
    """The loss or the gradient is not finite; the last good checkpoint is kept."""


class StoppedError(Exception):
    """The run was asked to stop, and did, after saving.

    Attributes:
        signal: The signal's number.
    """

    def __init__(self, step: int, steps: int, number: int):
        super().__init__(f"Asked to stop: saved at step {step} of {steps}; --resume goes on.")
        self.signal = number


def explained(error: BaseException) -> tuple[int, str] | None:
    """The exit code of an error and what to say of it; None of a fault."""
    match error:
        case StoppedError():
            return 128 + error.signal, str(error)
        case NotFiniteError():
            return NOT_FINITE, f"error: {error}"
        case ValueError():
            return BAD_INPUT, f"error: {error}"
        case OSError():
            kept = "What was saved before is as it was; --resume goes on."
            return FAILED, f"error: {error}. {kept}"
        case KeyboardInterrupt():
            return INTERRUPTED, "Interrupted. Add --resume to go on from the last checkpoint."
    return None
