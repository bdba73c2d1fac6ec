"""What `mesh models info` shows of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from meshnode.cli.shown import shown_cell
from meshnode.config import DEFAULT_CTX_TOKENS, human_bytes
from meshnode.models.classes import bytes_by_kind
from meshnode.models.description import bytes_by_type, cache_bytes, describe
from meshnode.models.facts import ModelFacts
from meshnode.models.identity import Identity
from meshnode.models.store.hearsay import told_root
from meshnode.models.store.slice import Slice
from meshnode.models.store.thinning import unneeded

_LABEL_CHARS = 17


def facts_json(facts: ModelFacts, identity: Identity | None, found: Slice | None) -> dict[str, Any]:
    return {
        **describe(facts),
        "path": str(facts.path),
        "files": [str(path) for path in facts.files],
        "root": identity.root if identity else None,
        "provisional": (identity.provisional or None) if identity else None,
        "told_root": asdict(told) if found and (told := told_root(found)) else None,
        "held_bytes": found.held_bytes if found else facts.weight_bytes,
        "unneeded_bytes": _unneeded_bytes(found) if found else 0,
        "held_tensors": len(found.held) if found else len(facts.tensors),
        "source": found.document.source if found else None,
    }


def facts_lines(facts: ModelFacts, identity: Identity | None, found: Slice | None) -> Iterator[str]:
    for label, text in _rows(facts, identity, found):
        yield f"{label.ljust(_LABEL_CHARS)}{shown_cell(text)}"


def _rows(
    facts: ModelFacts, identity: Identity | None, found: Slice | None
) -> Iterator[tuple[str, str]]:
    yield "name", facts.name
    yield (
        "file",
        str(facts.path) + (f" and {len(facts.files) - 1} more" if len(facts.files) > 1 else ""),
    )
    if found:
        held = f"{human_bytes(found.held_bytes)} of {human_bytes(facts.weight_bytes)}"
        yield "here", f"{held}, {len(found.held)} of {len(facts.tensors)} tensors"
        if beyond := _unneeded_bytes(found):
            yield "  of that", f"{human_bytes(beyond)} that no plan needs any more"
        yield "source", found.document.source or "not known"
    yield "architecture", facts.arch
    yield "parameters", f"{_short(facts.n_parameters)}, {facts.quantization or 'types below'}"
    yield "layers", f"{facts.n_layers}, {_sizes(facts.layer_bytes)} each"
    yield "widths", f"{facts.n_embd}, feed-forward {facts.n_ff}, vocabulary {facts.n_vocab}"
    heads = _range(facts.n_head_kv)
    yield "attention", f"{heads} key-value heads of {facts.head_dim_k} and {facts.head_dim_v}"
    if facts.n_expert:
        yield "experts", f"{facts.n_expert}, of which a token uses {facts.n_expert_used}"
    yield "context", f"{facts.n_ctx_train} tokens" if facts.n_ctx_train else "not known"
    yield "weights", human_bytes(facts.weight_bytes)
    for kind, size_bytes in bytes_by_kind(facts).items():
        yield f"  {kind.value}", human_bytes(size_bytes)
    if facts.tied_bytes:
        yield "  output", "the embedding again"
    yield "types", ", ".join(f"{name} {human_bytes(size)}" for name, size in bytes_by_type(facts))
    yield "cache", _cache_text(facts)
    yield "chat template", "no" if facts.chat_template is None else "yes"
    if identity and identity.root:
        yield "identity", identity.root
    elif identity:
        yield "identity", f"{identity.provisional} (provisional, until all of it was here)"
        if found and (told := told_root(found)):
            yield "  as told", f"{told.root} by {', '.join(told.tellers)}; not read here"
    else:
        yield "identity", "not known until it is served, or `mesh models verify` reads it"


def _unneeded_bytes(found: Slice) -> int:
    names = set(unneeded(found))
    return sum(tensor.nbytes for tensor in found.held if tensor.name in names)


def _cache_text(facts: ModelFacts) -> str:
    """What conversations take, at f16."""
    each = human_bytes(sum(facts.kv_bytes_per_token_per_layer))
    text = f"{each} a token at f16, {human_bytes(cache_bytes(facts))} for {DEFAULT_CTX_TOKENS}"
    windows = [cells.window for memory in facts.memory for cells in memory.caches if cells.window]
    if windows:
        text += f"; {len(windows)} of its caches go back {max(windows)} tokens at most"
    if any(memory.state_bytes for memory in facts.memory):
        text += "; states of one size"
    return text


def _sizes(sizes: tuple[int, ...]) -> str:
    least, most = human_bytes(min(sizes)), human_bytes(max(sizes))
    return least if least == most else f"{least} to {most}"


def _range(numbers: tuple[int, ...]) -> str:
    least, most = min(numbers), max(numbers)
    return str(most) if least == most else f"{least} to {most}"


def _short(count: int) -> str:
    """`7.6 billion`, as models are called."""
    for size, word in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if count >= size:
            return f"{count / size:.1f} {word}"
    return str(count)
