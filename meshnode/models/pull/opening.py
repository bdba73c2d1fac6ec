"""From a reference to a source: what is asked of hubs and registries before the first byte."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import trio

from meshnode.errors import UsageError
from meshnode.models.pull.client import Client, Named
from meshnode.models.pull.http import HttpSource, WebFile, open_http
from meshnode.models.pull.reach import Reach
from meshnode.models.pull.reference import (
    HubReference,
    MeshReference,
    OllamaReference,
    Reference,
    UrlReference,
)
from meshnode.models.pull.source import SourceError
from meshnode.models.pull.url import parse_url

OLLAMA_REGISTRY = "https://registry.ollama.ai"
MAX_MANIFEST_BYTES = 1 << 20
_MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
_MODEL_TYPE = "application/vnd.ollama.image.model"
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


@asynccontextmanager
async def open_reference(
    reference: Reference,
    reach: Reach,
    ollama_registry: str = OLLAMA_REGISTRY,
    *,
    with_token: bool = False,
) -> AsyncIterator[HttpSource]:
    """The files that a reference names, wherever on the web they are. with_token: a hub may be told
    who this machine's user is. Raises `SourceError`, `SourceFault`, `UsageError`."""
    match reference:
        case UrlReference():
            files = [WebFile(Named(url), _name(url.file_name)) for url in reference.urls]
        case HubReference():
            files = await _hub_files(reference, with_token)
        case OllamaReference():
            files = [await _ollama_file(reference, reach, ollama_registry)]
        case MeshReference():
            raise UsageError(f"{reference} is for peers to give, not for a server on the web")
    async with open_http(files, reach) as source:
        yield source


async def _hub_files(reference: HubReference, with_token: bool) -> list[WebFile]:
    """huggingface_hub says which address, and which token; it is asked nothing over the network,
    since it knows nothing of our rule for addresses."""
    links, token = await trio.to_thread.run_sync(_ask_huggingface_hub, reference)
    secrets = {}
    urls = [parse_url(link) for link in links]
    if not with_token:
        urls = [replace(url, authorization=None) for url in urls]  # a password in HF_ENDPOINT
    elif token is not None:
        if not (token.isascii() and token.isprintable()):
            raise UsageError("the token for Hugging Face has odd characters: log in again")
        secrets["Authorization"] = f"Bearer {token}"
    return [
        WebFile(Named(url, secrets), _name(file))
        for url, file in zip(urls, reference.files, strict=True)
    ]


def _ask_huggingface_hub(reference: HubReference) -> tuple[list[str], str | None]:
    """Addresses, and the user's token if there is one."""
    from huggingface_hub import constants, get_token, hf_hub_url  # takes half a second

    if constants.HF_HUB_OFFLINE:
        raise UsageError(f"{reference} is on the network, and HF_HUB_OFFLINE is set: unset it")
    endpoint = os.environ.get("HF_ENDPOINT") or None
    try:
        links = [
            hf_hub_url(reference.repository, file, revision=reference.revision, endpoint=endpoint)
            for file in reference.files
        ]
    except ValueError as error:  # of a name that cannot be
        raise UsageError(f"{reference} cannot be: {error}") from None
    return links, None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()


@dataclass(frozen=True)
class _Layer:
    digest: str
    size_bytes: int


async def _ollama_file(reference: OllamaReference, reach: Reach, registry: str) -> WebFile:
    place = f"{registry}/v2/{reference.path}"
    client = Client(reach)
    try:
        manifest = Named(parse_url(f"{place}/manifests/{reference.tag}"))
        data = await client.fetch(manifest, MAX_MANIFEST_BYTES, {"Accept": _MANIFEST_TYPE})
    finally:
        client.close()
    layer = model_layer_untrusted(data, str(reference))
    blob = Named(parse_url(f"{place}/blobs/sha256:{layer.digest}"))
    name = f"{reference.name}-{reference.tag}.gguf"
    return WebFile(blob, name, layer.digest, layer.size_bytes)


def model_layer_untrusted(data: bytes, title: str) -> _Layer:
    """The one layer of a manifest that is a model's weights. Raises `SourceError`."""
    try:
        layers = json.loads(data)["layers"]
        found = [layer for layer in layers if layer["mediaType"] == _MODEL_TYPE]
        digests = [_DIGEST.fullmatch(layer["digest"]) for layer in found]
        sizes = [layer["size"] for layer in found]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SourceError(f"the registry's word on {title} makes no sense: try later") from None
    if len(found) != 1:
        raise SourceError(f"{title} is no model in one GGUF file: take another, or from elsewhere")
    if digests[0] is None or not isinstance(sizes[0], int) or sizes[0] <= 0:
        raise SourceError(f"the registry's word on {title} makes no sense: try later")
    return _Layer(digests[0][1], sizes[0])


def _name(path: str) -> str:
    """The name of a file to be: the last part of a path, and nothing that leads elsewhere."""
    name = path.rpartition("/")[2]
    if not name.strip(".") or not name.isprintable() or any(letter in name for letter in "\\:"):
        name = f"model-{hashlib.sha256(path.encode()).hexdigest()[:8]}"
    return name if name.lower().endswith(".gguf") else f"{name}.gguf"
