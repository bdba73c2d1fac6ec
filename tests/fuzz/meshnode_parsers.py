"""What members, web pages, engines and files say to `meshnode`."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, cast

import cbor2
import trio

from meshnode.administration import parse_invite_request
from meshnode.cli.settings import read_settings
from meshnode.config import parse_address, parse_duration, parse_size
from meshnode.control import _answer_line
from meshnode.engine.devices import parse_device_list
from meshnode.engine.load_report import LoadReport
from meshnode.engine.rpc_probe import RpcUnreachable, _ask
from meshnode.errors import AccessError, BadMessage, HomeError, UsageError
from meshnode.gateway.body import check_json
from meshnode.gateway.events import EventGate
from meshnode.gateway.refusal import Refusal
from meshnode.gateway.rules import HostRule, is_json, is_own_origin
from meshnode.introduction import (
    parse_grants_untrusted,
    parse_member_untrusted,
)
from meshnode.messages import MessageStream, PeerGone, parse_message_untrusted
from meshnode.models.manifest import (
    BadManifest,
    Manifest,
    TensorEntry,
    engine_manifest,
    from_wire_untrusted,
    match,
    to_wire,
)
from meshnode.pipeline.layers import parse_layers, parse_tensor_split
from meshnode.pipeline.protocol import (
    DeviceFacts,
    Granted,
    LeaseRequest,
    WorkerFacts,
    parse_granted_untrusted,
    parse_lease_request_untrusted,
    parse_progress_untrusted,
    parse_reason_untrusted,
    parse_worker_facts_untrusted,
)
from meshnode.pipeline.speeds import Speed
from meshnode.pipeline.ways import Way
from meshnode.state import Home
from tests.fuzz.discovery_parsers import NOW, grant_seeds
from tests.fuzz.mutation import CborFormat, JsonFormat
from tests.fuzz.parser import REJECTED, Parser, check, text_of
from tests.fuzz.script import scratch_file, scratch_folder
from tests.fuzz.tunnels_parsers import HOSTILE


def finish(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine returns that never has to wait, its streams being made of memory."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waits for something")


class MemoryStream:
    """All that a peer ever says, in small pieces."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def receive_some(self, max_bytes: int) -> bytes:
        piece, self._data = self._data[: min(max_bytes, 1000)], self._data[min(max_bytes, 1000) :]
        return piece

    async def send_all(self, data: bytes) -> None:
        pass


# --- messages between nodes ---------------------------------------------------------------------


def run_message(data: bytes) -> object:
    message = parse_message_untrusted(data)
    check(all(isinstance(key, str) for key in message), "keys are texts")
    return message


def run_message_stream(data: bytes) -> int:
    messages = MessageStream(cast(trio.abc.HalfCloseableStream, MemoryStream(data)))
    count = 0
    while finish(messages.receive_or_end_untrusted()) is not None:
        count += 1
    return count


def framed(*messages: Mapping[str, Any]) -> bytes:
    bodies = [cbor2.dumps(dict(message)) for message in messages]
    return b"".join(len(body).to_bytes(4, "big") + body for body in bodies)


HELLO = {
    "name": "a worker",
    "seq": 1_700_000_000_000,
    "candidates": [
        ["quic", "192.0.2.1", 4242, "mapped"],
        ["quic", "fe80::1%eth0", 4242, "host"],
        ["relay", "192.0.2.9", 443, "host", bytes(range(32))],
    ],
    "grants": grant_seeds()[:2],
}
FACTS = WorkerFacts(
    *("a worker", "key", "cpu", 1 << 30),
    (DeviceFacts("CPU", "x86, 2 cores", False, 1 << 31, 1 << 30, Speed(1e10, 8e10)),),
    ("model-a", "model-b"),
    (Way(HOSTILE.peer, 0.004, 5e6, 12.0), Way(HOSTILE.peer)),
)
LEASE = LeaseRequest("key", "model", 1 << 30, b"wanted")
GRANTED = Granted("abc123", 9, 1, 2, ("blk.0.attn_q.weight",), ring=1)


def over_cbor(parse: Callable[[Mapping[str, Any]], Any]) -> Callable[[bytes], Any]:
    """A message read by `parse`; what it writes again reads back the same."""

    def run(data: bytes) -> Any:
        found = parse(parse_message_untrusted(data))
        if hasattr(found, "to_message"):
            again = parse_message_untrusted(cbor2.dumps(found.to_message()))
            check(parse(again) == found, "a message reads back")
        return found

    return run


def run_introduction(data: bytes) -> object:
    message = parse_message_untrusted(data)
    grants = parse_grants_untrusted(message)
    member = parse_member_untrusted(HOSTILE.peer, message, NOW)
    kinds = (candidate.kind for candidate in member.candidates)
    shown = (member.name, *kinds, *(str(candidate) for candidate in member.candidates))
    check(all(text.isprintable() for text in shown), "what is shown is printable")
    check(all(len(text) < 400 for text in shown), "what is shown is short")
    return grants


def invite_request(data: bytes) -> object:
    try:
        request = json.loads(data)
    except (ValueError, RecursionError):
        return REJECTED
    return parse_invite_request(request) if isinstance(request, dict) else REJECTED


# --- manifests ----------------------------------------------------------------------------------


def manifest() -> Manifest:
    names = ("token_embd.weight", "blk.0.attn_q.weight", "output.weight")
    entries = (
        TensorEntry(name, 8, (64, 32, 1, 1), 2176, 0, 0, bytes([number]) * 32)
        for number, name in enumerate(names)
    )
    return Manifest("ab" * 32, b"h" * 32, (), tuple(entries))


LOCAL = manifest()


def run_manifest(data: bytes) -> object:
    wanted = from_wire_untrusted(data)
    found = match(wanted.tensors, LOCAL)
    lines = engine_manifest(wanted.root, LOCAL, found.usable).splitlines()
    check(len(lines) == 2 + len(found.usable), "no tensor breaks a line of the engine's manifest")
    return wanted


# --- the engine's words -------------------------------------------------------------------------


def run_load_report(data: bytes) -> object:
    report, half = LoadReport(), len(data) // 2
    report.receive(data[:half])
    report.receive(data[half:])
    return report.loads or REJECTED


LOAD = {
    "event": "load",
    "server": "unix:/run/x.sock",
    "local_tensors": 9,
    "local_bytes": 9,
    "sent_tensors": 0,
    "sent_bytes": 0,
    "failures": 1,
    "first_failure": {"tensor": "t", "file": "f", "reason": "r"},
}


def run_rpc_probe(data: bytes) -> object:
    return finish(_ask(cast(trio.SocketStream, MemoryStream(data)), "there"))


def rpc_seeds() -> list[bytes]:
    def answer(body: bytes) -> bytes:
        return len(body).to_bytes(8, "little") + body

    hello = answer(b"\7\0\0\0" + bytes(24))
    memory = answer((1 << 30).to_bytes(8, "little") * 2)
    two = answer((2).to_bytes(4, "little"))
    return [hello + two + memory * 2, answer(b"\6\0\0\0" + bytes(24)) + two]


def run_events(data: bytes) -> object:
    gate, half = EventGate(), len(data) // 2
    passed = gate.feed(data[:half]) + gate.feed(data[half:])
    gate.ended_with(b"data: [DONE]")
    timings = gate.timings()
    check(passed + gate.flush() == data, "nothing is lost or changed on the way")
    return timings or REJECTED


EVENTS = (
    b'data: {"x":1}\n\ndata: {"timings":{"predicted_n":5,"predicted_ms":12.5}}\n\ndata: [DONE]\n\n'
)


# --- files --------------------------------------------------------------------------------------


class FileHome(Home):
    """A home that is not locked: only its reading is of interest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock_fd = -1


def run_home_file(data: bytes) -> object:
    scratch_file("membership.json", data)
    return FileHome(scratch_folder()).load_json("membership.json")


# --- local requests, web pages, arguments -------------------------------------------------------


class _Asked:
    """Requests to node.sock that went through."""

    async def invite(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"role": parse_invite_request(request)[0].value}


def run_control_line(data: bytes) -> object:
    answer = json.loads(finish(_answer_line(data, {"invite": _Asked().invite})))
    check("the node failed" not in answer.get("error", ""), "a request never fails the node")
    return REJECTED if "error" in answer else answer


def run_door(data: bytes) -> object:
    host, _, origin = data.decode("latin-1").partition("\n")
    bound = HostRule.for_bound("127.0.0.1").allows(host)
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    check(not bound or not name.endswith((".com", ".test")), "a foreign name is no name of ours")
    HostRule(None).allows(host)
    is_json(origin)
    return (bound and is_own_origin(origin, host)) or REJECTED


def of_text(parse: Callable[[str], Any]) -> Callable[[bytes], Any]:
    return lambda data: parse(text_of(data))


def run_arguments(data: bytes) -> object:
    return read_settings(text_of(data).split("\0"), join=(), join_file=())


def _json(*values: Any) -> Callable[[], list[bytes]]:
    return lambda: [json.dumps(value).encode() for value in values]


def _cbor(*values: Any) -> Callable[[], list[bytes]]:
    return lambda: [cbor2.dumps(value) for value in values]


def _texts(*texts: str) -> Callable[[], list[bytes]]:
    return lambda: [text.encode() for text in texts]


MESSAGES = (BadMessage,)
CBOR, JSON = CborFormat(), JsonFormat()
DEVICES = "Available devices:\n  CUDA0: NVIDIA X (24564 MiB, 23000 MiB free)\n"
INVITE = {"op": "invite", "role": "peer", "lifetime_s": 3600, "uses": 8}
BODY = {"model": "m", "messages": [{"role": "user", "content": "hé \ud83d\ude00"}], "n": 1.5}

PARSERS = (
    Parser("message", MESSAGES, _cbor(HELLO, LEASE.to_message()), run_message, format=CBOR),
    Parser(
        *(
            "message stream",
            (BadMessage, PeerGone),
            lambda: [framed(HELLO), framed({"op": "facts"})],
        ),
        run_message_stream,
    ),
    Parser("introduction", MESSAGES, _cbor(HELLO), run_introduction, format=CBOR),
    Parser(
        *("worker facts", MESSAGES, _cbor(FACTS.to_message())),
        over_cbor(parse_worker_facts_untrusted),
        format=CBOR,
    ),
    Parser(
        *("lease request", MESSAGES, _cbor(LEASE.to_message())),
        over_cbor(parse_lease_request_untrusted),
        format=CBOR,
    ),
    Parser(
        *("lease answer", MESSAGES, _cbor(GRANTED.to_message())),
        over_cbor(parse_granted_untrusted),
        format=CBOR,
    ),
    Parser(
        *("lease progress", MESSAGES, _cbor({"done_bytes": 1, "total_bytes": 2})),
        over_cbor(parse_progress_untrusted),
        format=CBOR,
    ),
    Parser(
        *("lease refusal", MESSAGES, _cbor({"reason": "too little memory"})),
        over_cbor(parse_reason_untrusted),
        format=CBOR,
    ),
    Parser("model manifest", (BadManifest,), lambda: [to_wire(LOCAL)], run_manifest, format=CBOR),
    Parser("home file", (HomeError,), _json(INVITE), run_home_file, format=JSON),
    Parser(
        *("load report", ()),
        lambda: [
            json.dumps(LOAD).encode() + b"\n",
            b'{"event":"progress","done_bytes":1,"total_bytes":2}\n',
            b'{"event":"server_progress","server":"unix:/a","done_bytes":1,"total_bytes":2}\n',
        ],
        run_load_report,
    ),
    Parser(
        "load report, as JSON",
        (),
        _json(LOAD),
        lambda data: run_load_report(data + b"\n"),
        format=JSON,
    ),
    Parser("rpc-server's answers", (RpcUnreachable,), rpc_seeds, run_rpc_probe),
    Parser("engine's devices", (), _texts(DEVICES), of_text(parse_device_list)),
    Parser("engine's events", (), lambda: [EVENTS], run_events),
    Parser("control line", (), _json(INVITE), run_control_line, format=JSON),
    Parser("invite request", (UsageError,), _json(INVITE), invite_request, format=JSON),
    Parser("request body", (Refusal,), _json(BODY), check_json, format=JSON),
    Parser(
        *("host and origin", ()),
        _texts("localhost:8090\nhttp://localhost:8090", "[::1]:80\nhttp://[::1]:80", "a.test\n"),
        run_door,
    ),
    Parser("size", (UsageError,), _texts("12G", "1.5GiB", "800 M", "77"), of_text(parse_size)),
    Parser("duration", (UsageError,), _texts("30m", "7d", "90s"), of_text(parse_duration)),
    Parser(
        *("address", (UsageError,), _texts("127.0.0.1:80", "[::1]:8090", ":0", "8090")),
        of_text(lambda text: parse_address(text, what="--http")),
    ),
    Parser(
        *("layers", (UsageError,), _texts("a=0:7,b=8:output", "local=3")), of_text(parse_layers)
    ),
    Parser(
        *("tensor split", (UsageError,), _texts("3,1", "0.5,0.25,0")), of_text(parse_tensor_split)
    ),
    Parser(
        *("settings", (UsageError, AccessError), _texts("rpc=10.0.0.5:50052\0join=mesh1qqq")),
        run_arguments,
    ),
)
