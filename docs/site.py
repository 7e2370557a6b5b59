"""What mkdocs needs to know of how this project writes: its Markdown is GitHub's, its docstrings are prose.

Named in mkdocs.yml, as a hook and as an extension of griffe.
"""

import re
from typing import Any

import griffe

NEW_LIST_OR_TABLE = re.compile(r"^(?!\s*[-|]|\s*\d+\.)(.*\S.*)\n(?=- |1\. |\|)", re.MULTILINE)
# "name: …", "name, name: …", "name (shape or type), name: …", "name (type)"
ITEM = r"[a-z_]\w*(?: \([^)]*\))?"
FIELD = re.compile(rf"({ITEM}(?:, {ITEM})*)(?:: |(?<=\))$)")
NAME = re.compile(r"(?<![\w`.(])[a-z_]\w*(?= \(|,|$|:)(?![^(]*\))")
CODE_OR_SPACE_WITHIN_A_QUANTITY = re.compile(r"(`[^`]*`)|(?<=\d) (?=(?:[kMGT]i?B|ms|s|fps|%)(?!\w))|(?<=×) | (?=×)")
FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts the empty line before lists and tables that mkdocs' Markdown asks for and GitHub's does not, and keeps
    quantities on one line."""
    return "".join(part if part.startswith("```") else _prose(part) for part in FENCE.split(markdown))


def _prose(markdown: str) -> str:
    markdown = NEW_LIST_OR_TABLE.sub(r"\1\n\n", markdown)
    return CODE_OR_SPACE_WITHIN_A_QUANTITY.sub(lambda found: found[1] or "\u00a0", markdown)


class FieldLists(griffe.Extension):
    """Shows the "name: meaning" lines of a docstring as a list, where they are about the object's own fields."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        names = set(obj.members)
        if isinstance(obj, griffe.Function | griffe.Class):
            names |= {parameter.name for parameter in obj.parameters}
        lines: list[str] = []
        in_list = False
        for line in obj.docstring.value.splitlines():
            match = FIELD.match(line)
            is_field = match is not None and not names.isdisjoint(NAME.findall(match[1]))
            if is_field:
                line = f"- {NAME.sub(lambda name: f'`{name[0]}`', match[1])}{line[match.end(1) :]}"
            goes_on = in_list and bool(line) and not lines[-1].endswith(".")  # a sentence that the line before began
            if is_field != in_list and not line.startswith(" ") and not goes_on:
                lines.append("")
                in_list = is_field
            lines.append(line)
        obj.docstring.value = "\n".join(lines)
