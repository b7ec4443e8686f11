"""The errors of this project, written for a person to read.

A message is one line: what failed, the file or layer, the value seen, the value needed, and what to do next.  A command
prints the message alone and exits with ``exit_code``.
"""

from __future__ import annotations


class MbqError(Exception):
    """Base of every error that a user can cause or mend."""

    exit_code = 1


class UsageError(MbqError):
    """The command, model or bundle does not accept an argument."""

    exit_code = 2


class PromptTooLongError(UsageError):
    """The prompt leaves no room for a reply in the context."""


class ModelError(MbqError):
    """A checkpoint is missing or broken, or the exporter does not support it."""

    exit_code = 3


class BundleError(MbqError):
    """A bundle is incomplete, altered, too new, or not for this machine."""

    exit_code = 4


class BuildError(MbqError):
    """A kernel library could not be compiled or linked."""

    exit_code = 5


class GrammarError(UsageError):
    """A grammar or a JSON schema that replies cannot be held to."""
