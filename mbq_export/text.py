"""Texts to calibrate and to evaluate on, without a download.

The wheel of gensim carries a slice of an English Wikipedia dump and news stories.  Its own
``filter_wiki`` turns the mark-up into plain text.  Wikipedia articles are dealt alternately to a
calibration half and an evaluation half, so that nothing is ever measured on what it was fitted to.
"""

from __future__ import annotations

import bz2
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from mbq_runtime.errors import UsageError

_WIKIPEDIA = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_NEWS = "lee_background.cor"
_MIN_ARTICLE_CHARS = 2000


def _bundled(name: str) -> Path:
    try:
        from gensim.test.utils import datapath
    except ImportError:
        raise UsageError(
            "no calibration text: the default one comes with gensim, which is not installed; "
            "give --calib-data FILE, or pip install 'mbq-export[export]'"
        ) from None
    return Path(datapath(name))


def _articles() -> Iterator[str]:
    from gensim.corpora.wikicorpus import filter_wiki

    with bz2.open(_bundled(_WIKIPEDIA)) as dump:
        for _, element in ElementTree.iterparse(dump):
            if element.tag.endswith("}text") and element.text and not element.text.startswith("#REDIRECT"):
                plain = filter_wiki(element.text)
                plain = re.sub(r"(?m)^[\s*:;#=|].*$|'{2,}", "", plain)
                plain = re.sub(r"\n\s*\n+", "\n\n", unicodedata.normalize("NFC", plain)).strip()
                if len(plain) >= _MIN_ARTICLE_CHARS:
                    yield plain
            element.clear()


def wikipedia(half: str) -> str:
    """English Wikipedia text; ``half`` is "calibration" or "evaluation"."""
    offset = {"calibration": 0, "evaluation": 1}[half]
    return "\n\n".join(article for i, article in enumerate(_articles()) if i % 2 == offset)


def news() -> str:
    """About 300 news stories: a second domain, never calibrated on."""
    return _bundled(_NEWS).read_text(encoding="utf-8", errors="strict")


def read(path: Path) -> str:
    """The UTF-8 text of ``path``.  Raises UsageError when it is missing, empty or not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"calibration file {path}: cannot be read ({error.strerror}); give a UTF-8 text file"
        ) from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"calibration file {path}: byte {error.start} is not UTF-8; convert the file to UTF-8 first"
        ) from None
    if not text.strip():
        raise UsageError(f"calibration file {path}: it is empty; give a text file of a few hundred kilobytes")
    return text
