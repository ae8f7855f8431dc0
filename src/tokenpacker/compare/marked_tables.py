"""Tables in documents: what stands between two marks is written anew."""

from __future__ import annotations

from collections.abc import Mapping

BEGIN, END = "<!-- {}:begin -->", "<!-- {}:end -->"


def put_tables(text: str, tables: Mapping[str, str]) -> str:
    """The document with each table between its marks, as far as it has them.

    Raises:
        ValueError: if the document has none of the marks.
    """
    marked = [name for name in tables if text.count(BEGIN.format(name)) == text.count(END.format(name)) == 1]
    if not marked:
        name = next(iter(tables))
        begin, end = BEGIN.format(name), END.format(name)
        raise ValueError(f"the document must have {begin} and {end} once each; write them where the table belongs")
    for name in marked:
        begin, end = BEGIN.format(name), END.format(name)
        place = text.index(begin) + len(begin)
        text = f"{text[:place]}\n{tables[name]}\n{text[text.index(end) :]}"
    return text
