"""The two ways in which a command ends early."""


class RunError(Exception):
    """What the user has to know and can mend, in one sentence: it is printed without a traceback."""


class Stopped(Exception):
    """The run was asked to stop by a signal and has saved its state."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum
