"""Whom a pull talks to: addresses by the rule, hosts by their certificate; secrets to theirs."""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Callable

import pytest
import trio
import trio.testing

from meshnode.models.pull import client, reach
from meshnode.models.pull.client import Named
from meshnode.models.pull.http import WebFile, open_http
from meshnode.models.pull.reach import Reach, proxy_for, welcome
from meshnode.models.pull.source import SourceError, SourceFault
from meshnode.models.pull.url import Origin, parse_url
from meshnode.models.web import Web as Opener
from tests.lab.certificate import certificate_for_loopback
from tests.lab.web import Query, Web, redirect
from tunnels import AddressPolicy

CONTENT = bytes(range(256)) * 100
SECRET = "hf_verysecret"
OPEN = Reach(welcome, welcome)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE_S", 0.001)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
async def web(nursery: trio.Nursery) -> Web:
    return await started(nursery)


async def started(nursery: trio.Nursery, tls: ssl.SSLContext | None = None) -> Web:
    web = Web(CONTENT, tls=tls)
    await nursery.start(web.run)
    return web


async def read(url: str, through: Reach = OPEN, **secrets: str) -> bytes:
    taken = bytearray()
    file = WebFile(Named(parse_url(url), secrets), "model.gguf")
    with trio.fail_after(60):
        async with open_http([file], through) as source:
            await source.read(0, 0, len(CONTENT), taken.extend)
    return bytes(taken)


class Names(trio.abc.HostnameResolver):
    """Names and what they mean, one meaning after the other."""

    def __init__(self, **meanings: list[str]) -> None:
        self._meanings = meanings
        self.asked = 0

    async def getaddrinfo(self, host, port, family=0, type=0, proto=0, flags=0):  # type: ignore[no-untyped-def]
        self.asked += 1
        name = host.decode() if isinstance(host, bytes) else host
        meaning = [name] if name == "127.0.0.1" else self._meanings.get(name, [])
        if not meaning:
            raise OSError(-2, "Name or service not known")
        address = meaning.pop(0) if len(meaning) > 1 else meaning[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, port))]

    async def getnameinfo(self, sockaddr, flags):  # type: ignore[no-untyped-def]
        raise NotImplementedError


# --- addresses --------------------------------------------------------------------------------


def only(*allowed: str) -> Callable[[str], str | None]:
    return lambda address: None if address in allowed else f"not tried: {address} is not welcome"


async def test_an_address_that_is_not_welcome_is_never_contacted(web: Web) -> None:
    with pytest.raises(SourceError, match=r"127\.0\.0\.1 is not welcome"):
        await read(web.url, Reach(only("10.0.0.1"), welcome))
    assert not web.connections


async def test_a_redirect_to_this_machine_is_not_followed_by_a_node_asked_from_afar(
    web: Web, nursery: trio.Nursery
) -> None:
    """The named address may be here, as the user's own word has it; what it leads to may not."""
    inner = await started(nursery)
    policy = AddressPolicy().at("0.0.0.0", ["192.168.1.5"])

    async def elsewhere(query: Query, stream: trio.abc.Stream) -> bool:
        await stream.send_all(redirect(inner.url.replace("127.0.0.1", "127.0.0.2")))
        return True

    web.behave = elsewhere
    with pytest.raises(SourceError, match="this machine itself"):
        await read(web.url, Reach(welcome, policy))
    assert not inner.connections


async def test_the_same_host_at_another_port_is_not_what_was_named(
    web: Web, nursery: trio.Nursery
) -> None:
    inner = await started(nursery)

    async def elsewhere(query: Query, stream: trio.abc.Stream) -> bool:
        await stream.send_all(redirect(inner.url))
        return True

    web.behave = elsewhere
    with pytest.raises(SourceError, match="not welcome"):
        await read(web.url, Reach(welcome, only("10.0.0.1")))
    assert not inner.connections


async def test_a_name_that_changes_its_meaning_after_the_check_changes_nothing(web: Web) -> None:
    names = Names(**{"models.example": ["127.0.0.1", "127.0.0.66"]})
    trio.socket.set_custom_hostname_resolver(names)
    rule = only("127.0.0.1")
    url = f"http://models.example:{web.port}/model.gguf"
    assert await read(url, Reach(rule, rule)) == CONTENT
    assert names.asked == 1
    with pytest.raises(SourceError, match=r"127\.0\.0\.66 is not welcome"):
        await read(url, Reach(rule, rule))


async def test_where_no_name_may_be_looked_up_none_is(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = Names(**{"models.example": ["127.0.0.1"], "localhost": ["127.0.0.1"]})
    trio.socket.set_custom_hostname_resolver(names)
    offline = Reach(welcome, welcome, looks_up=False)
    with pytest.raises(SourceError, match=r"offline .* no name is looked up"):
        await read(f"http://models.example:{web.port}/model.gguf", offline)
    monkeypatch.setenv("http_proxy", "http://models.example:3128")
    monkeypatch.setenv("no_proxy", "localhost")
    with pytest.raises(SourceError, match=r"models\.example:3128 is not asked"):
        await read("http://127.0.0.1:1/model.gguf", offline)
    assert names.asked == 0
    assert await read(f"http://localhost:{web.port}/model.gguf", offline) == CONTENT


async def test_an_unknown_name_and_a_closed_port_are_told(web: Web) -> None:
    trio.socket.set_custom_hostname_resolver(Names())
    with pytest.raises(SourceFault, match=r"the name models\.example is not found"):
        await read("http://models.example/x")
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    port = listener.socket.getsockname()[1]
    await listener.aclose()
    with pytest.raises(SourceFault, match="cannot be reached: Connection refused"):
        await read(f"http://127.0.0.1:{port}/x")


async def test_an_address_that_does_not_answer_does_not_hold_up_the_next(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach, "NEXT_ADDRESS_AFTER_S", 0.01)
    addresses = [("127.0.0.1", 1), ("127.0.0.1", web.port)]
    connected = await reach._first_of(addresses, Origin("http", "x", 80))
    with connected:
        assert connected.getpeername()[1] == web.port


async def test_who_answers_at_once_is_the_only_one_who_is_asked(
    web: Web, nursery: trio.Nursery
) -> None:
    other = await started(nursery)
    addresses = [("127.0.0.1", web.port), ("127.0.0.1", other.port)]
    connected = await reach._first_of(addresses, Origin("http", "x", 80))
    connected.close()
    await trio.testing.wait_all_tasks_blocked()
    assert not other.connections


# --- secrets ------------------------------------------------------------------------------------


async def test_a_token_goes_to_its_host_and_not_where_that_sends_us(
    web: Web, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    store = await started(nursery)

    async def elsewhere(query: Query, stream: trio.abc.Stream) -> bool:
        await stream.send_all(redirect(store.url + "?signature=xyz"))
        return True

    web.behave = elsewhere
    assert await read(web.url, Authorization=f"Bearer {SECRET}") == CONTENT
    assert [query.headers["authorization"] for query in web.queries] == [f"Bearer {SECRET}"]
    assert len(store.queries) == 2
    assert not any("authorization" in query.headers for query in store.queries)
    assert SECRET not in caplog.text
    assert "xyz" not in caplog.text


async def test_a_password_in_an_address_is_sent_and_not_repeated(web: Web) -> None:
    url = web.url.replace("http://", "http://me:hunter2@")
    assert await read(url) == CONTENT
    assert all(query.headers["authorization"].startswith("Basic ") for query in web.queries)

    async def refusing(query: Query, stream: trio.abc.Stream) -> bool:
        await stream.send_all(web.head(403, 0))
        return True

    web.behave = refusing
    with pytest.raises(SourceError) as caught:
        await read(url)
    assert "hunter2" not in str(caught.value)


# --- certificates -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's context for 127.0.0.1, and a client's that trusts it."""
    made = certificate_for_loopback(tmp_path_factory.mktemp("certificate"))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(made.certificate, made.key)
    return server, ssl.create_default_context(cafile=str(made.certificate))


async def test_tls_is_checked_against_the_name(
    certified: tuple[ssl.SSLContext, ssl.SSLContext], nursery: trio.Nursery
) -> None:
    server, trusting = certified
    web = await started(nursery, server)
    trusted = Reach(welcome, welcome, trusted=trusting)
    assert await read(web.url, trusted) == CONTENT
    assert web.connections == 1
    trio.socket.set_custom_hostname_resolver(Names(**{"models.example": ["127.0.0.1"]}))
    with pytest.raises(SourceError, match="no valid certificate"):
        await read(f"https://models.example:{web.port}/model.gguf", trusted)
    with pytest.raises(SourceError, match="no valid certificate"):
        await read(web.url)
    plain = await started(nursery)
    with pytest.raises(SourceFault, match="no TLS with"):
        await read(plain.url.replace("http", "https"), Reach(welcome, welcome, stall_s=0.05))


async def test_nobody_is_led_from_https_to_http(
    certified: tuple[ssl.SSLContext, ssl.SSLContext], web: Web, nursery: trio.Nursery
) -> None:
    server, trusting = certified
    secure = await started(nursery, server)

    async def elsewhere(query: Query, stream: trio.abc.Stream) -> bool:
        await stream.send_all(redirect(web.url))
        return True

    secure.behave = elsewhere
    with pytest.raises(SourceError, match="from https to http"):
        await read(secure.url, Reach(welcome, welcome, trusted=trusting))
    assert not web.connections


# --- proxies ------------------------------------------------------------------------------------


async def proxy(task_status: trio.TaskStatus[tuple[int, list[str]]]) -> None:
    """Tunnels for CONNECT, and the first lines and authorisations it was sent."""
    told: list[str] = []

    async def serve(client_side: trio.SocketStream) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += await client_side.receive_some()
        lines = head.decode().split("\r\n")
        told.append(lines[0])
        told.extend(line for line in lines if line.lower().startswith("proxy-authorization"))
        target = parse_url(lines[0].split(" ")[1]) if lines[0].startswith("GET") else None
        host, _, port = lines[0].split(" ")[1].rpartition(":")
        if target is not None:
            host, port = target.origin.host, str(target.origin.port)
        if host == "forbidden.example":
            await client_side.send_all(b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n")
            return
        server_side = await trio.open_tcp_stream("127.0.0.1", int(port))
        if target is None:
            await client_side.send_all(b"HTTP/1.1 200 Through\r\n\r\n")
        else:
            await server_side.send_all(head)

        async def carry(one: trio.SocketStream, other: trio.SocketStream) -> None:
            async for data in one:
                await other.send_all(data)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(carry, client_side, server_side)
            nursery.start_soon(carry, server_side, client_side)

    async def contained(stream: trio.SocketStream) -> None:
        try:
            await serve(stream)
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            await stream.aclose()

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, contained, listeners)
        task_status.started((listeners[0].socket.getsockname()[1], told))


async def test_the_proxy_of_the_environment_is_used(
    certified: tuple[ssl.SSLContext, ssl.SSLContext],
    web: Web,
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, trusting = certified
    secure = await started(nursery, server)
    port, told = await nursery.start(proxy)
    monkeypatch.setenv("https_proxy", f"http://me:hunter2@127.0.0.1:{port}")
    monkeypatch.setenv("http_proxy", f"127.0.0.1:{port}")
    through = Reach(welcome, welcome, trusted=trusting)
    assert await read(secure.url, through) == CONTENT
    assert told[0] == f"CONNECT 127.0.0.1:{secure.port} HTTP/1.1"
    assert told[1].lower().startswith("proxy-authorization: basic ")
    assert not any("proxy-authorization" in query.headers for query in secure.queries)
    assert await read(web.url, through) == CONTENT
    assert told[2] == f"GET {web.url} HTTP/1.1"
    with pytest.raises(SourceFault, match=r"refuses it \(403\)"):
        await read("https://forbidden.example/x", through)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    del told[:]
    assert await read(web.url, through) == CONTENT
    assert not told


@pytest.mark.parametrize("named", ["intranet.example", "rebound.example"])
async def test_others_reach_nothing_by_way_of_a_proxy_but_hubs(
    web: Web, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    """It looks names up itself: some that nobody knows here, others with another meaning."""
    trio.socket.set_custom_hostname_resolver(Names(**{"rebound.example": ["1.1.1.1"]}))
    port, told = await nursery.start(proxy)
    monkeypatch.setenv("http_proxy", f"127.0.0.1:{port}")
    opener = Opener()
    opener._for_strangers = OPEN
    with pytest.raises(SourceError, match=r"at another node's word.*`mesh pull`.*NO_PROXY"):
        async with opener.open_for_stranger(f"http://{named}:{web.port}/model.gguf"):
            pass
    assert not told
    monkeypatch.setenv("HF_ENDPOINT", f"http://hub.example:{web.port}")
    async with opener.open_for_stranger("hf:org/repo/model.gguf") as source:
        assert source.files[0].size_bytes == len(CONTENT)
    assert told


def test_a_proxy_that_is_none_of_ours_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:1080")
    with pytest.raises(SourceError, match="name one with http://"):
        proxy_for(Origin("https", "example.org", 443))
