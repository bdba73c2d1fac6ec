"""The tcp link: TLS connections straight to the peer, one a channel, so none waits for another.

The control connection carries the control channel and what the two ends of the link have to say to
each other (tcp_wire.py, the spec). Only the dialler dials: for a channel that the listener opens it
is asked to. A control connection that ends takes all channels with it.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections import deque
from collections.abc import Awaitable, Callable

import trio

from tunnels.allowance import Bucket, Rate
from tunnels.errors import BadFrame, LinkClosed
from tunnels.handshake import Role
from tunnels.link import LINK_KINDS, CloseCode, Closure
from tunnels.peer import format_address
from tunnels.stats import Losses, kernel_losses
from tunnels.tcp_channels import ControlChannel, TcpChannel
from tunnels.tcp_connection import Connection, Spawn
from tunnels.tcp_wire import (
    ID_BYTES,
    SECRET_BYTES,
    Close,
    Control,
    Dial,
    Join,
    MessageDecoder,
    Numbers,
    Secret,
    channel_proof,
    encode,
    is_channel_proof,
)

UNPROVEN_BYTES = 64 << 10  # all a stranger may send before it has proven its key
MAX_CHANNELS = 256  # open at once, of both sides together: a session has 100 streams each way
OPEN_TIMEOUT_S = (
    3.0  # for a further connection; to a peer that is heard, the link is of no use then
)
DIALS = Rate(per_s=50, burst=256)  # that the listener asks for; beyond, they wait

log = logging.getLogger(__name__)


class TcpLink:
    """One link. The transport makes further connections for me and brings me those of the peer.

    dial: a connection to the listener with the pinned key. register: from now on connections that
    name this id are mine, until the link is closed.
    """

    kind = "tcp"

    def __init__(
        self,
        control: Connection,
        role: Role,
        binding: bytes,
        *,
        near: bool,
        dial: Callable[[], Awaitable[Connection]],
        register: Callable[[bytes, TcpLink], None],
        spawn: Spawn,
    ) -> None:
        self.role = role
        self.binding = binding
        self.rank = LINK_KINDS[self.kind].rank_when(near)
        self.share = control.share
        self.closed = trio.Event()
        self.closure: Closure | None = None
        self.last_heard_s = trio.current_time()
        self.id = b""  # set with the secret
        self._secret = b""
        self._shared = trio.Event()  # the secret is known
        self._trusted = False
        self._connection = control
        self._control = ControlChannel(self, control)
        self._control_taken = False
        self._decoder = MessageDecoder()
        self._dial = dial
        self._register = register
        self._spawn = spawn
        self._next_number = 0 if role is Role.DIALLER else 1
        self._numbers = Numbers()
        self._channels: set[Connection] = set()
        self._past_bytes_in = 0
        self._past_bytes_out = 0
        self._accepted: deque[TcpChannel | ControlChannel] = deque()
        self._acceptors = trio.lowlevel.ParkingLot()
        self._awaited: dict[int, trio.Event] = {}
        self._joined: dict[int, TcpChannel] = {}
        self._dials = Bucket(DIALS, trio.current_time())
        if role is Role.LISTENER:
            control.may_send_bytes = UNPROVEN_BYTES
            self._accepted.append(self._control)

    @property
    def remote(self) -> str:
        return format_address(*self._connection.socket.remote)

    @property
    def host(self) -> str:
        return self._connection.socket.remote[0]

    @property
    def bytes_in(self) -> int:
        live = sum(one.bytes_in for one in self._channels)
        return self._past_bytes_in + self._connection.bytes_in + live

    @property
    def bytes_out(self) -> int:
        live = sum(one.bytes_out for one in self._channels)
        return self._past_bytes_out + self._connection.bytes_out + live

    @property
    def losses(self) -> Losses | None:
        """Of the connections that stand."""
        connections = (self._connection, *self._channels)
        return kernel_losses(one.socket.kernel for one in connections)

    @property
    def trusted(self) -> bool:
        return self._trusted

    @trusted.setter
    def trusted(self, proven: bool) -> None:
        """The peer has proven its key: from now on it may open channels."""
        if not proven or self._trusted:
            return
        self._trusted = True
        if self.role is Role.LISTENER:
            self._connection.may_send_bytes = math.inf
            self.id = secrets.token_bytes(ID_BYTES)
            self._secret = secrets.token_bytes(SECRET_BYTES)
            self._register(self.id, self)
            self._connection.send(encode(Secret(self.id, self._secret)))

    # --- the link protocol --------------------------------------------------------------

    async def open_channel(self) -> TcpChannel | ControlChannel:
        self._check_open()
        if self.role is Role.DIALLER and not self._control_taken:
            self._control_taken = True
            return self._control
        while True:
            number = self._next_number
            self._next_number += 2
            try:
                with trio.fail_after(OPEN_TIMEOUT_S):
                    if self.role is Role.DIALLER:
                        return await self._join(number)
                    return await self._ask_for(number)
            except trio.TooSlowError:
                if trio.current_time() - self.last_heard_s < OPEN_TIMEOUT_S:
                    self.close(CloseCode.LINK_OVER, "a further connection takes too long")
                # else the peer itself is silent: how long it is waited for others decide
            except LinkClosed as error:
                self.close(CloseCode.LINK_OVER, f"no further connection: {error}")
            self._check_open()

    async def accept_channel(self) -> TcpChannel | ControlChannel:
        while not self._accepted:
            self._check_open()
            await self._acceptors.park()
        return self._accepted.popleft()

    def close(self, code: CloseCode, reason: str) -> None:
        if not self.closed.is_set():
            self._connection.send(encode(Close(code, reason)))
            self._end(Closure(code, reason, by_peer=False))

    # --- the control connection ---------------------------------------------------------

    async def run(self) -> None:
        """Hear the other end of the link. Returns when the link is closed."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._listen)
                await self.closed.wait()
                nursery.cancel_scope.cancel()
        finally:
            self.close(CloseCode.SESSION_OVER, "the node is stopping")

    async def _listen(self) -> None:
        try:
            await self._take_messages()
            while data := await self._connection.receive():
                self.last_heard_s = trio.current_time()
                self._decoder.feed(data)
                await self._take_messages()
            self._control.end()
        except BadFrame as error:
            self.close(CloseCode.PROTOCOL_ERROR, str(error))
        except LinkClosed as error:
            if self._connection.gone is None:  # we hear no more of it, and say why
                self.close(CloseCode.PROTOCOL_ERROR, str(error))
            self._end(Closure(CloseCode.LOST, str(error), by_peer=False))

    async def _take_messages(self) -> None:
        while (message := self._decoder.next_untrusted()) is not None:
            match message:
                case Control(data):
                    await self._control.feed(data)
                case Secret(link, secret) if self.role is Role.DIALLER and not self._secret:
                    self.id, self._secret = link, secret
                    self._shared.set()
                case Dial(number) if self.role is Role.DIALLER:
                    await self._answer_dial(number)
                case Close(code, reason):
                    known = CloseCode(code) if code in set(CloseCode) else CloseCode.LOST
                    said = reason or "the connection was closed"
                    self._end(Closure(known, said, by_peer=True))
                    return
                case _:
                    raise BadFrame(f"a {type(message).__name__} message out of place")

    # --- further connections ------------------------------------------------------------

    async def _join(self, number: int) -> TcpChannel:
        """Dial the connection of channel `number`. Raises LinkClosed."""
        while not self._shared.is_set():
            self._check_open()
            await self._until_closed_or(self._shared)
        connection = await self._dial()
        connection.share = self.share
        fingerprint = connection.tls.fingerprint
        proof = channel_proof(self._secret, self.id, number, self.binding, fingerprint)
        connection.send(encode(Join(self.id, number, proof)))
        return self._adopt(connection)

    async def _ask_for(self, number: int) -> TcpChannel:
        """Have the dialler dial the connection of channel `number`. Raises LinkClosed."""
        arrived = self._awaited[number] = trio.Event()
        try:
            self._connection.send(encode(Dial(number)))
            await self._until_closed_or(arrived)
            self._check_open()
            return self._joined.pop(number)
        finally:
            del self._awaited[number]
            if (late := self._joined.pop(number, None)) is not None:
                late.reset()

    async def _answer_dial(self, number: int) -> None:
        if number % 2 == 0 or not self._numbers.use(number):
            raise BadFrame("a channel asked for twice, or under a number of ours")
        if len(self._channels) >= MAX_CHANNELS:
            raise BadFrame("more channels than one link carries")
        self._dials.spend(trio.current_time(), 1)
        await trio.sleep(self._dials.wait_s(trio.current_time()))

        async def answer() -> None:
            try:
                with trio.fail_after(OPEN_TIMEOUT_S):
                    self._take_over(await self._join(number))
            except trio.TooSlowError:
                log.debug("a connection that %s asked for takes too long", self.remote)
            except LinkClosed as error:
                log.debug("a connection that %s asked for failed: %s", self.remote, error)

        self._spawn(answer)

    def join(self, message: Join, connection: Connection) -> str | None:
        """Take a connection that somebody says is one of ours; a sentence when it is not.

        Whoever did not hear the secret cannot say so; who says again what was said on another
        connection gives itself away by the fingerprint, or by the number.
        """
        fingerprint = connection.tls.fingerprint
        number = message.number
        if self.closed.is_set() or not is_channel_proof(
            message.proof, self._secret, self.id, number, self.binding, fingerprint
        ):
            return "a connection that does not belong to its link"
        wanted = number in self._awaited and number not in self._joined
        if not self._numbers.use(number) or (number % 2 == 1 and not wanted):
            return "a channel that was opened before, or that nobody asked for"
        if len(self._channels) >= MAX_CHANNELS:
            return "more channels than one link carries"
        connection.share = self.share
        connection.may_send_bytes = math.inf
        channel = self._adopt(connection)
        if wanted:
            self._joined[number] = channel
            self._awaited[number].set()
        else:
            self._take_over(channel)
        return None

    def _take_over(self, channel: TcpChannel) -> None:
        self._accepted.append(channel)
        self._acceptors.unpark_all()

    def _adopt(self, connection: Connection) -> TcpChannel:
        if self.closure is not None:
            connection.lose(self.closure.reason)
            raise LinkClosed(self.closure.reason)
        self._channels.add(connection)
        connection.on_over = lambda: self._forget(connection)
        return TcpChannel(self, connection)

    def _forget(self, connection: Connection) -> None:
        if connection in self._channels:
            self._channels.remove(connection)
            self._past_bytes_in += connection.bytes_in
            self._past_bytes_out += connection.bytes_out

    # --- the end ------------------------------------------------------------------------

    async def _until_closed_or(self, event: trio.Event) -> None:
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                await self.closed.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            await event.wait()
            nursery.cancel_scope.cancel()

    def _check_open(self) -> None:
        if self.closure is not None:
            raise LinkClosed(self.closure.reason)

    def _end(self, closure: Closure) -> None:
        if self.closed.is_set():
            return
        self.closure = closure
        self.closed.set()
        for connection in list(self._channels):
            connection.lose(closure.reason)
        self._control.end()
        self._connection.say_goodbye(closure.reason)
        self._acceptors.unpark_all()
