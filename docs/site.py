"""What mkdocs needs to know of how this project writes: its Markdown is GitHub's, its docstrings are prose.

Named in mkdocs.yml, as a hook and as an extension of griffe.
"""

import re
from typing import Any

import griffe

NEW_LIST_OR_TABLE = re.compile(r"^(?!\s*[-|]|\s*\d+\.)(.*\S.*)\n(?=- |1\. |\|)", re.MULTILINE)
FIELD = re.compile(r"^([a-z_]\w*(?:, [a-z_]\w*)*): ", re.MULTILINE)
FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts the empty line before lists and tables that mkdocs' Markdown asks for and GitHub's does not."""
    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else NEW_LIST_OR_TABLE.sub(r"\1\n\n", part) for part in parts)


class FieldLists(griffe.Extension):
    """Shows the "name: meaning" lines of a docstring as a list, where they are about the object's own fields."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        names = set(obj.members)
        if isinstance(obj, griffe.Function):
            names = {parameter.name for parameter in obj.parameters}
        elif isinstance(obj, griffe.Class) and "__init__" in obj.members:
            names |= {parameter.name for parameter in obj.parameters}

        def as_item(match: re.Match[str]) -> str:
            if not names.intersection(match[1].split(", ")):
                return match[0]
            return f"- {', '.join(f'`{name}`' for name in match[1].split(', '))}: "

        paragraphs = []
        for paragraph in obj.docstring.value.split("\n\n"):
            listed = FIELD.sub(as_item, paragraph)
            if listed != paragraph and not listed.startswith("- "):  # the list begins below a sentence
                listed = listed.replace("\n- ", "\n\n- ", 1)
            paragraphs.append(listed)
        obj.docstring.value = "\n\n".join(paragraphs)
