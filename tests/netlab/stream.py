"""Ask for a streamed completion and tell each event as it comes, after the monotonic time:
python stream.py URL BODY"""

from __future__ import annotations

import http.client
import sys
import time
from urllib.parse import urlsplit


def main() -> None:
    url, body = sys.argv[1:]
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=300)
    connection.request("POST", parts.path, body, {"Content-Type": "application/json"})
    for line in connection.getresponse():
        if line.startswith(b"data: "):
            print(time.monotonic(), line[6:].decode().strip(), flush=True)


if __name__ == "__main__":
    main()
