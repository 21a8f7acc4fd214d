"""The errors that are shown to a user as a message, never as a traceback."""

from __future__ import annotations

from collections.abc import Sequence

from megalite.exit_codes import ExitCode


class ConfigError(ValueError):
    """The command, a file or an environment breaks rules; holds all violations at once.

    Attributes:
        violations: one sentence each: the flag or file, the value, the rule, the nearest choice.
        code: with which the program ends.
    """

    code = ExitCode.BAD_INPUT

    def __init__(self, violations: Sequence[str] | str):
        self.violations = [violations] if isinstance(violations, str) else list(violations)
        super().__init__(self.message())

    def message(self) -> str:
        """The text for the terminal."""
        if len(self.violations) == 1:
            return f"megalite: {self.violations[0]}"
        lines = [f"megalite: {len(self.violations)} problems:"]
        return "\n".join(lines + [f"  - {violation}" for violation in self.violations])


class DataError(ConfigError):
    """A data file cannot be used; the message names it, what was expected and what was found."""


class DamagedError(ConfigError):
    """A checkpoint is damaged or hostile; the message names the file, and the tensor if there is
    one."""

    code = ExitCode.DAMAGED


class RunError(RuntimeError):
    """A run cannot go on, for a reason that is no mistake in the program.

    Attributes:
        code: with which the run ends.
    """

    def __init__(self, message: str, code: ExitCode):
        super().__init__(message)
        self.code = code

    def message(self) -> str:
        """The text for the terminal."""
        return f"megalite: {self}"
