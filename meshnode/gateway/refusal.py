"""Errors in the shape of OpenAI's API, and every one that the gateway itself answers.

====== ====================== ====================================================================
status code                   when
====== ====================== ====================================================================
400    `invalid_json`         the body is no JSON object
400    `bad_length`           the Content-Length header is no number of bytes
400    `client_gone`          the client left before its body was whole (nobody reads this)
400    `bad_request`          a query of the registry's that makes no sense
401    `key_needed`           the operator's key is missing, or is another
403    `forbidden_host`       the Host header names neither this machine nor what was bound
403    `forbidden_origin`     the request comes from a web page of another origin
404    `unknown_route`        nothing is served at this path
404    `unknown_model`        no model of this node has that name or identity
404    `unknown_file`         the model has fewer files
404    `unknown_node`         a pull is to be on a node that this one does not know
404    `not_here`             this node does not hold these bytes of the model
405    `method_not_allowed`   something is, but not for this method
409    `ambiguous_model`      several models of this node have that name
409    `model_unusable`       the model is here and cannot be read
408    `body_too_slow`        the body did not arrive in time
413    `body_too_large`       the body is larger than `MAX_BODY_BYTES`
412    `other_bytes`          If-Match names other bytes than those that are here
415    `not_json`             a POST whose content type is not application/json
416    `no_such_bytes`        the file ends before the range begins
416    `too_many_ranges`      more ranges at once than are given
500    `internal_error`       a defect of the gateway
501    `not_served`           llama-server could, but the model as it is served here cannot
502    `pull_failed`          in a pull's last event: the source is gone, the disk full
502    `upstream_lost`        the model's server or a worker died while it was answering
503    `model_changing`       the model's files are being written to
503    `gateway_busy`         the bodies of other requests fill the memory set aside for them, or
                              too many readers or pulls are there already
503    `not_ready`            no model is ready to answer (yet, or any more); see Retry-After
====== ====================== ====================================================================

What llama-server answers by itself (a 400 for a bad parameter, say) is passed on as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from starlette.responses import JSONResponse

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    500: "server_error",
    501: "not_supported_error",
    502: "server_error",
    503: "unavailable_error",
}
_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Refusal(Exception):
    """A request that is answered with an error of ours."""

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] = _NO_HEADERS
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = headers

    def body(self) -> dict[str, object]:
        """The `error` object as OpenAI's clients read it."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": None, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, dict(self.headers))
