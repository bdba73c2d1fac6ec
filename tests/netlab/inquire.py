"""`python tests/netlab/inquire.py FROM TO`: one multicast DNS question by unicast; "yes" or "no".

From another port than 5353, so that the answer comes by unicast too (RFC 6762 section 6.7). Asked
three times: a question may be heard before there is anything to tell.
"""

from __future__ import annotations

import socket
import sys

from zeroconf import DNSOutgoing, DNSQuestion  # type: ignore[attr-defined] # not typed so

QUERY, PTR, IN = 0, 12, 1
SERVICE = "_mesh-llm._udp.local."
WAIT_S = 2.0  # the same question is not heard twice within one


def main() -> None:
    ours, theirs = sys.argv[1:]
    question = DNSOutgoing(QUERY)
    question.add_question(DNSQuestion(SERVICE, PTR, IN))
    answered = False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        asker.bind((ours, 0))
        asker.settimeout(WAIT_S)
        for _ in range(3):
            asker.sendto(question.packets()[0], (theirs, 5353))
            try:
                answered = bool(asker.recv(9000)) or answered
            except TimeoutError:
                continue
    print("yes" if answered else "no")


if __name__ == "__main__":
    main()
