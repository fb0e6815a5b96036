"""An extension of Griffe, for the site: examples in docstrings are shown as code."""

from __future__ import annotations

import re
from typing import Any

import griffe

# An example is what doctest takes for one: from its prompt to the next empty line.
EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


class FencedExamples(griffe.Extension):
    """Puts fences around examples, which Markdown would take for quotations and links."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change an object's docstring, if it has one."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
