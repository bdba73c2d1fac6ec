"""Streams over networks that nobody chose, and through whatever happens to them: not a byte is lost
or doubled, what is kept meanwhile is bounded, and where there is a path again they go on. Where the
other side begins anew they end, with a sentence, and a new connection works."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import trio
import trio.testing
from hypothesis import Phase, event, given, settings
from hypothesis import strategies as st

from tests.lab.datagrams import Weather, World
from tests.lab.nats import Internet, Kind, Router
from tests.lab.nodes import Node, echo, exchange, start_node, start_relay
from tests.lab.talks import Talk
from tunnels import Session, TunnelError
from tunnels.credit import MAX_WINDOW_BYTES
from tunnels.errors import StreamError
from tunnels.frames import MAX_DATA_BYTES
from tunnels.heartbeat import DEAD_S
from tunnels.link import CloseCode
from tunnels.links import MAX_LINKS

PORT = 4433
PATIENCE_S = 2000.0  # of fake time: a story that hangs
GOES_ON_WITHIN_S = 30.0
ENDS_WITHIN_S = 10.0
BURST_BYTES = 140_000  # more than a window begins with
LOOK_EVERY_S = 0.5


class Fault(Protocol):
    """Over when it returns: there is a path again."""

    async def happen(self, lab: Lab) -> None: ...


@dataclass(frozen=True)
class Cut:
    """times: one after the other, a second between. moves: who has another address after it."""

    seconds: float
    times: int = 1
    moves: str | None = None

    async def happen(self, lab: Lab) -> None:
        for _ in range(self.times):
            lab.world.cut = True
            await trio.sleep(self.seconds)
            if self.moves:
                lab.move(self.moves)
            lab.world.cut = False
            await trio.sleep(1 if self.times > 1 else 0)


@dataclass(frozen=True)
class Move:
    who: str

    async def happen(self, lab: Lab) -> None:
        lab.move(self.who)


@dataclass(frozen=True)
class Rebind:
    """The NAT before alice forgets, and gives other ports."""

    async def happen(self, lab: Lab) -> None:
        lab.rebind()


@dataclass(frozen=True)
class Blocked:
    """A firewall drops one of the protocols, on bob's side, and lets nothing of it begin."""

    protocol: str
    seconds: float

    async def happen(self, lab: Lab) -> None:
        if self.protocol == "udp":
            lab.world.without_udp = {lab.hosts["bob"].addresses[0]}
        else:
            lab.world.tcp_blocked = True
            lab.world.era += 1
        await trio.sleep(self.seconds)
        lab.world.without_udp, lab.world.tcp_blocked = set(), False


@dataclass(frozen=True)
class LinksLost:
    who: str

    async def happen(self, lab: Lab) -> None:
        session = lab.session(self.who)
        for link in session.standing if session else ():
            link.close(CloseCode.LINK_OVER, "cut by the test")


@dataclass(frozen=True)
class RelayGone:
    goodbye: bool
    seconds: float

    async def happen(self, lab: Lab) -> None:
        if "rita" in lab.nodes:
            await lab.restart("rita", goodbye=self.goodbye, away_s=self.seconds)


@dataclass(frozen=True)
class Worse:
    """The weather changes, and stays so."""

    weather: Weather

    async def happen(self, lab: Lab) -> None:
        lab.world.weather = self.weather


@dataclass(frozen=True)
class Restart:
    """One of the two begins anew: all its streams are over."""

    who: str
    goodbye: bool
    away_s: float


@dataclass(frozen=True)
class Story:
    """kinds: of links between the two. nat: before alice. chapters: each what happens, after a
    pause, and who restarts at its end."""

    kinds: tuple[str, ...]
    nat: Kind | None
    weather: Weather
    chapters: tuple[tuple[tuple[tuple[float, Fault], ...], Restart | None], ...]
    seed: int


def weathers(delays_s: list[float], losses: list[float]) -> st.SearchStrategy[Weather]:
    return st.builds(
        Weather,
        delay_s=st.sampled_from(delays_s),
        jitter_s=st.sampled_from([0.0, 0.02, 0.1]),
        loss=st.sampled_from(losses),
        duplication=st.sampled_from([0.0, 0.2]),
    )


def stories(
    kinds: list[tuple[str, ...]], weather: st.SearchStrategy[Weather]
) -> st.SearchStrategy[Story]:
    outages = st.sampled_from([0.3, 2.9, 5.0, 20.0, 45.0])
    ends = st.sampled_from(["alice", "bob"])
    faults: st.SearchStrategy[Fault] = st.one_of(
        st.builds(Cut, outages, moves=st.sampled_from([None, "alice", "bob"])),
        st.builds(Cut, st.sampled_from([0.3, 1.0, 4.0]), times=st.integers(2, 6)),
        st.builds(Move, ends),
        st.builds(Rebind),
        st.builds(Blocked, st.sampled_from(["udp", "tcp"]), outages),
        st.builds(LinksLost, ends),
        st.builds(RelayGone, st.booleans(), st.sampled_from([0.5, 5.0, 30.0])),
        st.builds(Worse, weather),
    )
    pauses_s = st.sampled_from([0.1, 1.0, 7.0])
    happenings = st.lists(st.tuples(pauses_s, faults), max_size=4).map(tuple)
    restarts = st.builds(Restart, ends, st.booleans(), st.sampled_from([0.0, 2.0, 30.0]))
    last = st.tuples(happenings, st.none())
    return st.builds(
        Story,
        kinds=st.sampled_from(kinds),
        nat=st.sampled_from([None, Kind.FULL_CONE, Kind.HOME, Kind.SYMMETRIC]),
        weather=weather,
        chapters=st.tuples(last) | st.tuples(st.tuples(happenings, restarts), last),
        seed=st.integers(0, 2**16),
    )


# Through a relay each way is two: at 0.6 s there and back, a tenth of it lost, an outage may last
# for minutes longer than it does.
all_stories = stories(
    [("quic",), ("tcp",), ("tcp", "quic")], weathers([0.001, 0.02, 0.15], [0.0, 0.01, 0.03])
) | stories([("relay",), ("tcp", "quic", "relay")], weathers([0.001, 0.02], [0.0, 0.01]))


class Lab:
    """alice, who dials bob and may be behind a NAT; rita, a relay, where links through one are
    allowed."""

    def __init__(self, story: Story, nursery: trio.Nursery) -> None:
        self.story = story
        self.nursery = nursery
        self.world = World(story.weather, story.seed)
        internet = Internet(self.world)
        self.router = Router("11.0.1.1", story.nat) if story.nat else None
        home = internet.network(self.router) if self.router else None
        self.hosts = {
            "alice": internet.host("192.168.1.2" if home else "11.1.0.1", behind=home),
            "bob": internet.host("11.1.0.2"),
            "rita": internet.host("11.1.0.9"),
        }
        self.nodes: dict[str, Node] = {}
        self.talks: list[Talk] = []
        self.restarting = False
        self._moves = 0

    # --- nodes ---------------------------------------------------------------------------

    async def start(self, name: str) -> None:
        host = self.hosts[name]
        if name == "rita":
            self.nodes[name] = await start_relay(self.nursery, host, name, port=PORT)
            return
        node = self.nodes[name] = await start_node(
            *(self.nursery, host, name),
            port=PORT,
            dead_after_s=DEAD_S,
            transports=self.story.kinds,
        )
        node.endpoint.serve("echo", echo)
        if "relay" in self.story.kinds:
            self.nursery.start_soon(self._stay_reserved, node)

    async def _stay_reserved(self, node: Node) -> None:
        """As meshnode.reserving does."""
        while not node.scope.cancel_called:
            rita = self.nodes["rita"].endpoint
            try:
                places = rita.candidates()
                session = await node.endpoint.connect(rita.peer, places)
                direct = [one for one in places if one.via is None]
                await node.endpoint.relaying.reserve(
                    session, direct, lambda _: node.endpoint.tell_candidates_changed()
                )
            except (TunnelError, RuntimeError):  # the one or the other does not run
                pass
            await trio.sleep(1)

    async def restart(self, name: str, *, goodbye: bool, away_s: float) -> None:
        node = self.nodes[name]
        if goodbye:
            node.stop()
        else:
            node.kill()
        await trio.sleep(0.5 + away_s)
        for address in self.hosts[name].addresses:
            self.world.plug_in(address)
        await self.start(name)

    # --- the network ---------------------------------------------------------------------

    def move(self, name: str) -> None:
        if name == "bob" and self.router:
            return  # nobody would know where he is: alice cannot be dialled, and he has moved
        self._moves += 1
        net = "192.168.1" if name == "alice" and self.router else "11.1.1"
        self.world.move(self.hosts[name], f"{net}.{10 + self._moves}")

    def rebind(self) -> None:
        self.world.era += 1
        if self.router:
            self.router.rebind()

    async def tell_places(self) -> None:
        """As meshnode.whereabouts does: over the session, while the other is heard."""
        while True:
            pair = [self.session(name) for name in ("alice", "bob")]
            alice, bob = (self.nodes[name].endpoint for name in ("alice", "bob"))
            if all(one is not None and not one.suspected for one in pair):
                with contextlib.suppress(RuntimeError):  # one does not run
                    alice.learn(bob.peer, bob.candidates())
                    bob.learn(alice.peer, alice.candidates())
            await trio.sleep(0.5)

    # --- streams -------------------------------------------------------------------------

    def session(self, name: str) -> Session | None:
        other = "bob" if name == "alice" else "alice"
        return self.nodes[name].endpoint.session(self.nodes[other].endpoint.peer)

    async def connect(self) -> None:
        """alice dials bob, and both talk."""
        with trio.fail_after(GOES_ON_WITHIN_S):
            session = await self._connected()
        theirs = self.session("bob")
        assert theirs is not None
        self.talks = [
            Talk(await end.open("echo"), seed, 300, 0.25)
            for seed, end in enumerate((session, theirs))
        ]

    async def _connected(self) -> Session:
        """Tried again while what stands is with one that is no more."""
        alice, bob = (self.nodes[name].endpoint for name in ("alice", "bob"))
        if "relay" in self.story.kinds:
            for one in (alice, bob):
                while not one.relaying.reservations():
                    await one.candidates_changed.wait()
        while True:
            try:
                session = await alice.connect(bob.peer, bob.candidates())
                assert await exchange(await session.open("echo"), b"hello") == b"hello"
                return session
            except* TunnelError:
                await trio.sleep(0.5)

    async def talk(self, talk: Talk, until: trio.Event) -> None:
        try:
            await talk.run(until)
        except* StreamError:
            if not self.restarting:
                raise

    async def watch_bounds(self) -> None:
        while True:
            for session in filter(None, map(self.session, ("alice", "bob"))):
                assert len(session.standing) <= MAX_LINKS
                for stream in session._streams:
                    kept, cap = stream.state.kept_bytes, stream.state._send._cap.bytes
                    assert kept <= cap + MAX_DATA_BYTES, "a record may be acknowledged in part"
                    assert cap <= MAX_WINDOW_BYTES
                    assert stream.state.readable_bytes <= stream.state._window.size_bytes
            await trio.sleep(LOOK_EVERY_S)

    async def chapter(
        self, happens: Iterable[tuple[float, Fault]], restart: Restart | None
    ) -> None:
        talks, over = self.talks, trio.Event()
        async with trio.open_nursery() as nursery:
            for talk in talks:
                nursery.start_soon(self.talk, talk, over)
            for pause_s, fault in happens:
                await trio.sleep(pause_s)
                for talk in talks:
                    talk.burst(BURST_BYTES)
                await fault.happen(self)
            if restart is None:
                healed_s = trio.current_time()
                with trio.fail_after(GOES_ON_WITHIN_S):
                    for talk in talks:
                        await talk.heard_after(healed_s)
                over.set()
                continue_s = PATIENCE_S
            else:
                self.restarting = True
                await self.restart(restart.who, goodbye=restart.goodbye, away_s=restart.away_s)
                await self.connect()
                continue_s = ENDS_WITHIN_S
            nursery.cancel_scope.deadline = trio.current_time() + continue_s
        assert not nursery.cancel_scope.cancelled_caught, "streams of before hang"
        self.restarting = False


async def run(story: Story) -> None:
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            lab = Lab(story, nursery)
            nursery.start_soon(lab.world.run)
            names = ("rita", "alice", "bob") if "relay" in story.kinds else ("alice", "bob")
            for name in names:
                await lab.start(name)
            await lab.connect()
            nursery.start_soon(lab.tell_places)
            nursery.start_soon(lab.watch_bounds)
            for happens, restart in story.chapters:
                await lab.chapter(happens, restart)
            nursery.cancel_scope.cancel()


# A failure is shown as it was found: to shrink one takes longer than to read it.
@settings(max_examples=14, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(all_stories)
def test_streams_outlive_whatever_happens_but_the_end_of_the_other_side(story: Story) -> None:
    trio.run(run, story, clock=trio.testing.MockClock(autojump_threshold=0))
    event(f"{'+'.join(story.kinds)}, {story.nat.name if story.nat else 'open'}")
    for _, restart in story.chapters:
        event(f"{restart and restart.who} restarts")
