"""XML from strangers: elements and their text, and nothing else that XML can do.

expat reads it, with everything switched off that could make a short document a long one or reach
out of it: a document type (and so entities, DTDs, external files) ends the reading, an encoding
that it names is not looked up. Attributes, comments and processing instructions are passed over;
of a name, what is before a colon too: routers are careless with namespaces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from xml.parsers import expat

from tunnels.errors import BadFrame

MAX_XML_BYTES = 128 << 10
MAX_ELEMENTS = 4096
MAX_DEPTH = 32


@dataclass
class Element:
    """`text`: what stands directly in it, without white space around."""

    name: str
    children: list[Element] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces).strip()

    def child_text(self, name: str) -> str:
        """Of the first child so named; "" where there is none."""
        return next((one.text for one in self.children if one.name == name), "")

    def each(self, name: str) -> Iterator[Element]:
        """All below with this name, and this itself."""
        if self.name == name:
            yield self
        for child in self.children:
            yield from child.each(name)


class _Reader:
    def __init__(self) -> None:
        self.root = Element("")
        self._open = [self.root]
        self._count = 0

    def start(self, name: str, _attributes: dict[str, str]) -> None:
        self._count += 1
        if self._count > MAX_ELEMENTS or len(self._open) > MAX_DEPTH:
            raise BadFrame("an XML document with too many elements")
        element = Element(name.rpartition(":")[2])
        self._open[-1].children.append(element)
        self._open.append(element)

    def end(self, _name: str) -> None:
        self._open.pop()

    def text(self, text: str) -> None:
        self._open[-1].pieces.append(text)

    def refuse(self, *_what: object) -> None:
        raise BadFrame("an XML document with a document type")


def parse_xml_untrusted(data: bytes) -> Element:
    """The outermost element. Raises BadFrame."""
    if len(data) > MAX_XML_BYTES:
        raise BadFrame(f"an XML document of {len(data)} bytes")
    reader = _Reader()
    parser = expat.ParserCreate("utf-8")
    parser.buffer_text = True
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.text
    parser.StartDoctypeDeclHandler = reader.refuse
    try:
        # Latin-1 in a friendly name is common; what counts here is ASCII.
        parser.Parse(data.decode("utf-8", "replace").encode(), True)
    except expat.ExpatError as error:
        raise BadFrame(f"this is no XML: {expat.ErrorString(error.code)}") from error
    return reader.root.children[0]
