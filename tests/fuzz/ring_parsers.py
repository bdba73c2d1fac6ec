"""What is said between workers, and on a lease's stream about their pushing to each other."""

from __future__ import annotations

import cbor2

from meshnode.errors import BadMessage
from meshnode.pipeline.probing import parse_probe_untrusted
from meshnode.pipeline.protocol import (
    End,
    PushFrom,
    PushNews,
    PushTo,
    parse_push_news_untrusted,
    parse_push_order_untrusted,
)
from tests.fuzz.meshnode_parsers import CBOR, over_cbor
from tests.fuzz.parser import Parser
from tests.fuzz.tunnels_parsers import HOSTILE

ORDERS = (PushFrom(HOSTILE.peer), PushTo(HOSTILE.peer, "abc123"))
NEWS = (PushNews(End.FROM, True, silent=True), PushNews(End.TO, False, "it is gone"))

PARSERS = (
    Parser(
        *("order to push", (BadMessage,), lambda: [cbor2.dumps(x.to_message()) for x in ORDERS]),
        over_cbor(parse_push_order_untrusted),
        format=CBOR,
    ),
    Parser(
        *("news of a push", (BadMessage,), lambda: [cbor2.dumps(x.to_message()) for x in NEWS]),
        over_cbor(parse_push_news_untrusted),
        format=CBOR,
    ),
    Parser(
        *("order of a burst", (BadMessage,), lambda: [cbor2.dumps({"give": 32768})]),
        over_cbor(parse_probe_untrusted),
        format=CBOR,
    ),
)
