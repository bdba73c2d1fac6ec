"""`python tests/netlab/spoof.py FILE ADDRESS ROUNDS PAUSE_S`: multicast DNS answers that lie.

FILE holds one announcement a line, in hex; each goes out as a node's own would, ROUNDS times, and
besides something that is no announcement at all.
"""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path

from zeroconf import DNSOutgoing, DNSPointer, DNSText  # type: ignore[attr-defined] # not typed so

GROUP = ("224.0.0.251", 5353)
SERVICE = "_mesh-llm._udp.local."
PTR, TXT, IN, UNIQUE, ANSWER, TTL_S = 12, 16, 1, 0x8001, 0x8400, 4500


def packet(number: int, text: bytes) -> bytes:
    out = DNSOutgoing(ANSWER)
    name = f"liar{number}.{SERVICE}"
    out.add_answer_at_time(DNSPointer(SERVICE, PTR, IN, TTL_S, name), 0)
    out.add_answer_at_time(DNSText(name, TXT, UNIQUE, TTL_S, text), 0)
    return bytes(out.packets()[0])


def main() -> None:
    path, address, rounds, pause_s = sys.argv[1:]
    texts = [bytes.fromhex(line) for line in Path(path).read_text().split()]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(address))
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 255)
        for turn in range(int(rounds)):
            for number, text in enumerate([*texts, b"\x07nothing", b"\xffcut"]):
                sender.sendto(packet(number * 1000 + turn, text), GROUP)
                time.sleep(float(pause_s))


if __name__ == "__main__":
    main()
