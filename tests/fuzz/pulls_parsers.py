"""What members say of the models they have, and of pulls that one asks of another."""

from __future__ import annotations

import cbor2

from meshnode.errors import AmbiguousModel, BadMessage, NoSuchModel
from meshnode.messages import parse_message_untrusted
from meshnode.models.peers.listing import (
    Listed,
    Told,
    choose,
    parse_digests_untrusted,
    parse_listing_untrusted,
    to_message,
)
from meshnode.models.peers.protocol import (
    DigestsRequest,
    Holding,
    HoldsRequest,
    ModelsRequest,
    ReadRequest,
    parse_holding_untrusted,
    parse_request_untrusted,
)
from meshnode.models.spans import Span
from meshnode.pipeline.commission import (
    Commission,
    Failed,
    Held,
    News,
    Progressed,
    parse_commission_untrusted,
    parse_news_untrusted,
)
from meshnode.pipeline.pull_order import PullOrder
from meshnode.pipeline.pull_order import from_wire_untrusted as order_from_wire_untrusted
from meshnode.pipeline.pull_order import to_wire as order_to_wire
from tests.fuzz.meshnode_parsers import over_cbor
from tests.fuzz.mutation import CborFormat
from tests.fuzz.parser import REJECTED, Parser, check

PART, OTHER, ROOT = "1a" * 32, "1b" * 32, "2a" * 32
LISTED = (
    Listed("glm-4", ("org/repo/glm-4",), PART, None, 1000, 400),
    Listed("glm-4", (), OTHER, ROOT, 1000, 1000),
)
QUESTIONS = (
    *(HoldsRequest("0f" * 32), ReadRequest("0f" * 32, 1, 10, 20)),
    *(ModelsRequest(), DigestsRequest("0f" * 32)),
)
HOLDING = Holding((("a.gguf", 100), ("b.gguf", 50)), "etag:1", (Span(0, 0, 30), Span(1, 5, 50)))
ORDER = PullOrder("https://example.org/model.gguf", "0f" * 32, (0, 3, 4))
COMMISSIONS = (Commission("https://example.org/m.gguf", "27:52"), Commission("mesh:glm-4"))
NEWS: tuple[News, ...] = (
    *(Progressed(1, 2), Failed("the disk is full", 7)),
    Held("glm-4", ROOT, 5, 10, 20, False, "digests"),
)
WORDS = ("glm-4", ROOT)


def run_listing(data: bytes) -> object:
    models = parse_listing_untrusted(parse_message_untrusted(data))
    check(parse_listing_untrusted(to_message(models)) == models, "a list reads back")
    told = [Told("ben", one) for one in models] + [Told("cy", LISTED[0])]
    for word in WORDS:
        try:
            choice = choose(word, told, ["dan"])
        except (AmbiguousModel, NoSuchModel) as error:
            check(str(error).isprintable() and len(str(error)) < 10_000, "it is told in a sentence")
        else:
            check(choice.members != () and choice.provisionals != (), "a choice is somebody's")
    return models or REJECTED


def run_order(data: bytes) -> object:
    found = order_from_wire_untrusted(data, 5)
    check(order_from_wire_untrusted(order_to_wire(found), 5) == found, "an order reads back")
    return found


def run_digests(data: bytes) -> object:
    found = parse_digests_untrusted(parse_message_untrusted(data))
    check(all(len(digest) == 32 for digest in found), "digests are whole")
    return found


def run_news(data: bytes) -> object:
    found = over_cbor(parse_news_untrusted)(data)
    if isinstance(found, Failed):
        check(found.reason.isprintable() and len(found.reason) <= 1000, "a reason can be shown")
        check(found.code > 0, "what failed is no success")
    return found


MESSAGES = (BadMessage,)
CBOR = CborFormat()

PARSERS = (
    Parser(
        *("question to a store", MESSAGES),
        lambda: [cbor2.dumps(one.to_message()) for one in QUESTIONS],
        over_cbor(parse_request_untrusted),
        format=CBOR,
    ),
    Parser(
        *("holding", MESSAGES),
        lambda: [cbor2.dumps(HOLDING.to_message())],
        over_cbor(parse_holding_untrusted),
        format=CBOR,
    ),
    Parser("pull order", MESSAGES, lambda: [order_to_wire(ORDER)], run_order, format=CBOR),
    Parser(
        *("list of models", MESSAGES),
        lambda: [cbor2.dumps(to_message(LISTED)), cbor2.dumps(to_message(LISTED[:1]))],
        run_listing,
        format=CBOR,
    ),
    Parser(
        *("digests of a model", MESSAGES),
        lambda: [cbor2.dumps({"digests": bytes(range(64))})],
        run_digests,
        format=CBOR,
    ),
    Parser(
        *("order to another node", MESSAGES),
        lambda: [cbor2.dumps(one.to_message()) for one in COMMISSIONS],
        over_cbor(parse_commission_untrusted),
        format=CBOR,
    ),
    Parser(
        *("news of an order", MESSAGES),
        lambda: [cbor2.dumps(one.to_message()) for one in NEWS],
        run_news,
        format=CBOR,
    ),
)
