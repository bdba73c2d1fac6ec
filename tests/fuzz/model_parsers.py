"""Headers of models, from a file and from bytes that come one after another."""

from __future__ import annotations

from meshnode.errors import ModelError
from meshnode.models.facts import ModelFacts, facts_of, read_facts
from meshnode.models.header import HeaderIncomplete, parse_header
from meshnode.models.kv import CacheOptions, memory_bytes
from tests.fuzz.gguf_seeds import gguf_seeds
from tests.fuzz.parser import Parser, check
from tests.fuzz.script import scratch_file


def run_model(data: bytes) -> object:
    facts = read_facts(scratch_file("model.gguf", data))
    check(sum(facts.layer_bytes) <= len(data), "no layer is larger than the file")
    for tensor in facts.tensors:
        check(tensor.offset + tensor.nbytes <= len(data), "tensors lie inside the file")
        check(tensor.name.isprintable(), "a tensor's name is printable")
    for layer, kept in enumerate(facts.memory):
        check(
            memory_bytes(kept, CacheOptions(1024, 2)) >= 0, "nothing is kept in less than no memory"
        )
        check(
            0 <= facts.read_bytes[layer] <= facts.layer_bytes[layer], "no more is read than there"
        )
    check_fetched(data, facts)
    return facts


def check_fetched(data: bytes, facts: ModelFacts) -> None:
    """A header is the same if its bytes come one after another."""
    have = 24
    while True:
        try:
            fetched = parse_header(data[:have], len(data), facts.path)
        except HeaderIncomplete as error:
            check(
                have < error.at_least_bytes <= len(data), "more bytes are asked for, not too many"
            )
            have = max(error.at_least_bytes, min(2 * have, len(data)))
        else:
            check(facts_of([fetched]) == facts, "the same facts")
            return


PARSERS = (Parser("model file", (ModelError,), gguf_seeds, run_model),)
