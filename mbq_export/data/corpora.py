"""Texts to calibrate and to evaluate on that need no download.

The wheel of gensim carries a part of an English Wikipedia dump and news stories.  gensim's ``filter_wiki`` turns the
mark-up into plain text.  Each Wikipedia article belongs to one part, so that no figure is measured on text that it
was fitted to: every second article is for evaluation; of the others, every fourth is held back from calibration, to
choose routers and set thresholds.  Technical prose is the language reference that Python carries.  Code is modules of
Python's standard library, others for each part.
"""

from __future__ import annotations

import bz2
import re
import sysconfig
import tokenize
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

from mbq_runtime.errors import UsageError

_WIKIPEDIA = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_NEWS = "lee_background.cor"
_CODE_MODULES = {
    "calibration": (
        "ast", "argparse", "calendar", "cmd", "codecs", "contextlib", "copy", "dataclasses", "doctest",
        "enum", "ftplib", "functools", "gettext", "gzip", "html.parser", "http.client", "http.cookies",
        "http.server", "imaplib", "inspect", "json.decoder", "json.encoder", "locale", "logging", "mailbox",
        "mimetypes", "optparse", "pickletools", "platform", "plistlib", "pprint", "profile", "pstats",
        "random", "selectors", "shutil", "smtplib", "socketserver", "subprocess", "tarfile", "threading",
        "timeit", "turtle", "typing", "urllib.parse", "urllib.request", "weakref", "zipfile",
    ),
    "validation": (
        "base64", "fnmatch", "getopt", "glob", "ipaddress", "keyword", "numbers", "pkgutil", "pyclbr",
        "reprlib", "tempfile", "tokenize", "trace", "uuid", "wave", "xmlrpc.client",
    ),
    "evaluation": (
        "bisect", "configparser", "csv", "difflib", "fractions", "heapq", "queue", "sched", "shlex",
        "statistics", "string", "textwrap",
    ),
}  # fmt: skip
_MIN_ARTICLE_CHARS = 2000
# Lines of headings, lists, tables, images and instructions to the wiki.  The space is not \s, which would also match
# an empty line and remove the paragraph after it.
_NO_PROSE = re.compile(r"(?m)^(?:[ \t*:;#=|]|File:|Image:|__).*$|'{2,}")
_WIKIPEDIA_DEAL = ("calibration", "evaluation") * 3 + ("validation", "evaluation")


def _bundled(name: str) -> Path:
    try:
        from gensim.test.utils import datapath
    except ImportError:
        raise UsageError(
            "no calibration text: the default one comes with gensim, which is not installed; "
            "give --calib-data FILE, or pip install 'mbq-export[export]'"
        ) from None
    return Path(datapath(name))


@cache
def _articles() -> tuple[str, ...]:
    """The dump's longer articles as plain text, in the dump's order."""
    return tuple(_plain_articles())


def _plain_articles() -> Iterator[str]:
    from gensim.corpora.wikicorpus import filter_wiki

    with bz2.open(_bundled(_WIKIPEDIA)) as dump:
        for _, element in ElementTree.iterparse(dump):
            if element.tag.endswith("}text") and element.text and not element.text.startswith("#REDIRECT"):
                plain = filter_wiki(element.text)
                plain = _NO_PROSE.sub("", plain)
                plain = re.sub(r"\n\s*\n+", "\n\n", unicodedata.normalize("NFC", plain)).strip()
                if len(plain) >= _MIN_ARTICLE_CHARS:
                    yield plain
            element.clear()


def wikipedia(part: str) -> str:
    """English Wikipedia text.

    Args:
        part: "calibration", "validation" (held back from calibration) or "evaluation".
    """
    kept = [article for i, article in enumerate(_articles()) if _WIKIPEDIA_DEAL[i % len(_WIKIPEDIA_DEAL)] == part]
    return "\n\n".join(kept)


def news() -> str:
    """About 300 news stories, a second domain.  Nothing is calibrated on them."""
    return _bundled(_NEWS).read_text(encoding="utf-8", errors="strict")


def technical() -> str:
    """The Python language reference, a third domain.  Nothing is calibrated on it."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def code(part: str) -> str:
    """Source of modules of the running Python, a fourth domain.

    Args:
        part: "calibration", "validation" or "evaluation", as for ``wikipedia``.
    """
    return "\n\n".join(_source(name) for name in _CODE_MODULES[part])


def _source(module: str) -> str:
    """The source of a module, which is not run: turtle needs tkinter, which Debian's Python does not have."""
    place = Path(sysconfig.get_path("stdlib"), *module.split("."))
    file = next((f for f in (place.with_suffix(".py"), place / "__init__.py") if f.is_file()), None)
    if file is None:
        raise UsageError(
            f"no calibration text: this Python has no source of its module {module} in {place.parent}; give "
            "--calib-data FILE, or use another Python"
        )
    with tokenize.open(file) as opened:
        return opened.read()
