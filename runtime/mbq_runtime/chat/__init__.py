"""The chat of ``mbq chat``: a conversation in a terminal."""

from __future__ import annotations
