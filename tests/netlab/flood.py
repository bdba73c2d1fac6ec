"""`python tests/netlab/flood.py ADDRESS SECONDS`: multicast DNS questions, as fast as they go."""

from __future__ import annotations

import itertools
import socket
import sys
import time

from zeroconf import DNSOutgoing, DNSQuestion  # type: ignore[attr-defined] # not typed so

from tests.netlab.spoof import GROUP, IN, PTR, SERVICE

QUESTION, HOST = 0, 1
BATCH = 20


def question(number: int) -> bytes:
    """One that every node answers, beside one that makes it different from all others."""
    out = DNSOutgoing(QUESTION)
    out.add_question(DNSQuestion(SERVICE, PTR, IN))
    out.add_question(DNSQuestion(f"host{number}.local.", HOST, IN))
    return bytes(out.packets()[0])


def main() -> None:
    address, seconds = sys.argv[1:]
    packets = itertools.cycle([question(number) for number in range(5000)])
    end_s = time.monotonic() + float(seconds)
    sent = 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(address))
        while time.monotonic() < end_s:
            for packet in itertools.islice(packets, BATCH):
                sender.sendto(packet, GROUP)
            sent += BATCH
            time.sleep(0.001)
    print(sent)


if __name__ == "__main__":
    main()
