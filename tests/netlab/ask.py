"""`python tests/netlab/ask.py URL [BODY]`: one request from inside a namespace, the answer as text.

GET without BODY (JSON), POST with it.
"""

from __future__ import annotations

import sys
import urllib.request


def main() -> None:
    url, *rest = sys.argv[1:]
    data = rest[0].encode() if rest else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        sys.stdout.write(answer.read().decode())


if __name__ == "__main__":
    main()
