"""The exceptions this project raises for a person to read, one line each.

Every message says what failed, which file or layer, the value seen, the value needed and
what to do next.  Command lines print the message alone and exit with ``exit_code``.
"""

from __future__ import annotations


class MbqError(Exception):
    """Base of every error a user can cause or mend."""

    exit_code = 1


class UsageError(MbqError):
    """An argument is outside what the command, model or bundle accepts."""

    exit_code = 2


class ModelError(MbqError):
    """A checkpoint is missing, broken or of a kind that cannot be lowered."""

    exit_code = 3


class BundleError(MbqError):
    """A bundle is incomplete, altered, too new, or not meant for this machine."""

    exit_code = 4


class BuildError(MbqError):
    """A kernel library could not be compiled or linked."""

    exit_code = 5
