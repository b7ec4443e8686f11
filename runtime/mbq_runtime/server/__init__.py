"""The server of ``mbq serve``: OpenAI's API for a bundle, and a monitor page.  It needs the extra ``serve``."""

from __future__ import annotations
