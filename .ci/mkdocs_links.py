# SPDX-License-Identifier: Apache-2.0
"""A hook of mkdocs: files that a page links to, and that `docs/` does not hold, become part of the site."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"\]\(\.\./([^)#]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add every file that a page links to as ``../PATH``."""
    for page in list(files.documentation_pages()):
        for path in _LINK.findall(page.content_string):
            if (ROOT / path).is_file():
                files.append(File.generated(config, _place(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point such links at the copy; a link to what is no file stays, and is a warning."""
    return _LINK.sub(lambda found: f"]({_place(found[1])})" if (ROOT / found[1]).is_file() else found[0], markdown)


def _place(path: str) -> str:
    # Not as a page of its own, and out of the way of names in docs/. A dot at its start would hide it.
    place = path.replace("/.", "/").lstrip(".")
    return f"repository/{place}.txt" if path.endswith(".md") else f"repository/{place}"
