"""``mbq serve``: a bundle behind OpenAI's API, with a page that shows the board.  Needs the extra ``serve``."""

from __future__ import annotations
