"""How a TURN server is named."""

from __future__ import annotations

import pytest

from tunnels.turn import TurnServer, parse_turn

SECRET = "hunter2hunter2"


@pytest.mark.parametrize(
    ("text", "server"),
    [
        ("turn:a.example,me", TurnServer("a.example", 3478, "udp", "me", SECRET)),
        ("turn:192.0.2.1:99?transport=tcp,me", TurnServer("192.0.2.1", 99, "tcp", "me", SECRET)),
        ("turn:a.example?transport=tls,me", TurnServer("a.example", 5349, "tls", "me", SECRET)),
        ("turns:[2001:db8::1]:443,me", TurnServer("2001:db8::1", 443, "tls", "me", SECRET)),
        ("turns:a?transport=tcp,me", TurnServer("a", 5349, "tls", "me", SECRET)),
    ],
)
def test_a_server_is_read(text: str, server: TurnServer) -> None:
    assert parse_turn(text, SECRET) == server
    assert SECRET not in repr(server)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is named turn:"),
        ("stun:a,me", "is named turn:"),
        ("turn:a", "is named turn:"),
        ("turn:a,", "is named turn:"),
        (f"turn:a,me,{SECRET}", "does not belong there"),
        ("turn:a?transport=sctp,me", "udp, tcp, tls"),
        ("turns:a?transport=udp,me", "udp, tcp, tls"),
        ("turn:a:0,me", "1 to 65535"),
        ("turn:a:65536,me", "1 to 65535"),
    ],
)
def test_anything_else_is_a_sentence_without_the_password(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as error:
        parse_turn(text, SECRET)
    assert SECRET not in str(error.value)


def test_a_password_is_wanted() -> None:
    with pytest.raises(ValueError, match="password"):
        parse_turn("turn:a,me", "")
