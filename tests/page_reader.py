"""Reads a page of ours without a browser."""

from html.parser import HTMLParser


class PageReader(HTMLParser):
    """Collects what a page would load and run, and checks that its tags close."""

    VOID = ("meta", "br", "path", "image", "link", "img", "source")

    def __init__(self, page: str):
        super().__init__()
        self.open_tags: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "srcset", "href", "xlink:href", "action")]
        if tag not in self.VOID:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open_tags.pop()

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag
