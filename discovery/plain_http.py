"""HTTP/1.1 with a stranger: one question, one answer, both small. No I/O.

h11 reads it. A redirect is an answer like another, and followed by nobody.
"""

from __future__ import annotations

import h11

from tunnels.errors import BadFrame

MAX_HEAD_BYTES = 8 << 10
MAX_ANSWER_BYTES = 128 << 10  # head and all
PIECE_BYTES = 2 << 10


class Exchange:
    """I turn a question into bytes, and bytes into an answer."""

    def __init__(self) -> None:
        self._connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._body = bytearray()
        self._heard_bytes = 0
        self.status: int | None = None
        self.done = False

    def question(self, host: str, path: str, *, soap_action: str = "", body: bytes = b"") -> bytes:
        """A POST where there is a SOAP action, else a GET. path: printable ASCII."""
        headers = [("Host", host), ("Connection", "close"), ("User-Agent", "mesh")]
        if soap_action:
            headers += [
                ("SOAPAction", soap_action),
                ("Content-Type", 'text/xml; charset="utf-8"'),
                ("Content-Length", str(len(body))),
            ]
        method = "POST" if soap_action else "GET"
        request = h11.Request(method=method, target=path, headers=headers)
        return b"".join(
            self._connection.send(event) or b""
            for event in (request, *((h11.Data(data=body),) if body else ()), h11.EndOfMessage())
        )

    def feed_untrusted(self, data: bytes) -> None:
        """Bytes as they come, b"" at the end; until `done`. Raises BadFrame."""
        self._heard_bytes += len(data)
        if self._heard_bytes > MAX_ANSWER_BYTES:
            raise BadFrame("an HTTP answer without end")
        # In small pieces: h11 limits the lines that it waits for, not those that came at once.
        for start in range(0, max(len(data), 1), PIECE_BYTES):
            self._feed(data[start : start + PIECE_BYTES])

    def _feed(self, data: bytes) -> None:
        try:
            self._connection.receive_data(data)
            while not self.done:
                match self._connection.next_event():
                    case h11.Response(status_code=status):
                        self.status = status
                    case h11.Data(data=piece):
                        self._body += piece
                    case h11.EndOfMessage():
                        self.done = True
                    case h11.InformationalResponse():
                        pass
                    case _:
                        return
        except h11.RemoteProtocolError as error:
            raise BadFrame(f"this is no HTTP: {str(error)[:100]}") from error

    @property
    def body(self) -> bytes:
        return bytes(self._body)
