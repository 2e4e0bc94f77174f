"""For the site's API pages: a section that begins on its own line, "Raises: what", becomes a paragraph."""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"^(Args|Returns|Raises|Memory|Limits|Source|Shape): (\S.*)$")


class Sections(griffe.Extension):
    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = paragraphs(obj.docstring.value)


def paragraphs(text: str) -> str:
    found, inside = [], False
    for line in text.split("\n"):
        section = SECTION.match(line)
        if section:
            found += ["", f"**{section[1]}.** {section[2]}"]
        elif inside and line.startswith(" "):
            found.append(line.strip())
        else:
            found.append(line)
        inside = bool(section) or (inside and line.startswith(" "))
    return "\n".join(found)
