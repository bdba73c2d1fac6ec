"""Whether a request shows the operator's key (`meshnode.operator_key`)."""

from __future__ import annotations

import hmac

from meshnode.gateway.refusal import Refusal

_CHALLENGE = {"www-authenticate": 'Bearer realm="mesh"'}


def check_key(key: str, authorization: str) -> None:
    """`authorization`: the header of that name, empty without one. Raises `Refusal` (401)."""
    scheme, _, given = authorization.strip().partition(" ")
    is_right = hmac.compare_digest(key.encode(), given.strip().encode("utf-8", "replace"))
    if not is_right or scheme.lower() != "bearer":
        said = "is not the one" if given else "is needed"
        raise Refusal(
            401,
            "key_needed",
            f"the operator's key {said}: `mesh key` prints it on the node's machine; send it as "
            "`Authorization: Bearer KEY`",
            _CHALLENGE,
        )
