"""The demo model is what the issue asks for, and its published result is about this very file."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import gguf
import pytest

from meshnode.demo.corpus import BadCorpus, normalise, read_corpus
from meshnode.demo.evaluate import (
    MODEL_PATH,
    PASS_MARK,
    RESULT_PATH,
    Question,
    evaluate,
    read_questions,
    sha256_of,
)

MAX_MODEL_BYTES = 8_000_000
MAX_VOCAB = 8_000
MIN_LAYERS = 8
# Of the words of both: a paraphrase shares some, a copy with a word changed nearly all.
MAX_WORDS_SHARED = 0.7


@pytest.fixture(scope="module")
def header() -> gguf.GGUFReader:
    return gguf.GGUFReader(MODEL_PATH)


def value(header: gguf.GGUFReader, key: str) -> Any:
    field = header.get_field(key)
    assert field is not None, key
    return field.contents()


def test_is_a_llama_model_of_the_promised_size(header: gguf.GGUFReader) -> None:
    assert value(header, "general.architecture") == "llama"
    assert value(header, "llama.block_count") >= MIN_LAYERS
    assert len(value(header, "tokenizer.ggml.tokens")) <= MAX_VOCAB
    assert MODEL_PATH.stat().st_size <= MAX_MODEL_BYTES


def test_brings_a_chat_template_and_ends_its_turns(header: gguf.GGUFReader) -> None:
    template = value(header, "tokenizer.chat_template")
    tokens = value(header, "tokenizer.ggml.tokens")
    assert "<|user|>" in template
    assert tokens[value(header, "tokenizer.ggml.eos_token_id")] == "<|end|>"
    assert tokens[value(header, "tokenizer.ggml.bos_token_id")] == "<|bos|>"


def test_every_layer_has_its_weights_so_that_any_split_works(header: gguf.GGUFReader) -> None:
    layers = {t.name.split(".")[1] for t in header.tensors if t.name.startswith("blk.")}
    assert layers == {str(layer) for layer in range(value(header, "llama.block_count"))}


def test_twenty_questions_none_of_which_the_corpus_can_make() -> None:
    corpus, questions = read_corpus(), read_questions()
    assert len({normalise(question.ask) for question in questions}) == 20
    assert {question.ask: corpus.can_make(question.ask) for question in questions} == {
        question.ask: None for question in questions
    }


def test_the_corpus_recognises_what_it_makes() -> None:
    """Or the test above could not fail."""
    corpus, rng = read_corpus(), random.Random(8090)
    for intent in corpus.intents:
        for pattern in intent.patterns:
            question = corpus.sample(pattern, rng)
            assert corpus.can_make(question), question
            opener, closer = rng.choice(corpus.words["opener"]), rng.choice(corpus.words["closer"])
            assert corpus.can_make(f"{opener} {question.title()} {closer}!"), question


def test_nor_one_that_shares_nearly_all_its_words() -> None:
    corpus = read_corpus()
    near = {question.ask: corpus.nearest(question.ask) for question in read_questions()}
    assert {ask: found for ask, found in near.items() if found[0] > MAX_WORDS_SHARED} == {}
    assert corpus.nearest("On which port does it listen?")[0] == 1.0


def test_no_answer_of_the_corpus_repeats_a_question_of_the_twenty() -> None:
    answers = [normalise(intent.answer) for intent in read_corpus().intents]
    for question in read_questions():
        assert not any(normalise(question.ask) in answer for answer in answers)


def test_each_question_is_answered_rightly_by_one_intent_but_not_by_most() -> None:
    """The facts can be met, and they are no formality."""
    answers = [intent.answer for intent in read_corpus().intents]
    for question in read_questions():
        n_right = sum(not question.missing(answer) for answer in answers)
        assert 1 <= n_right <= 8, (question.ask, n_right)


def test_an_answer_without_the_fact_is_wrong() -> None:
    question = Question("Which port?", (("8090",), ("port", "listens")))
    assert question.missing("It listens on 8090.") == ()
    assert question.missing("It listens on 8080.") == (("8090",),)


def test_a_corpus_line_without_a_mark_is_named(tmp_path: Path) -> None:
    (tmp_path / "words.inc").write_text("machine = box\n")
    (tmp_path / "a.txt").write_text("= port\nwhich port\n")
    with pytest.raises(BadCorpus, match="which port"):
        read_corpus(tmp_path)


def test_the_published_result_belongs_to_this_model_and_passes() -> None:
    result = json.loads(RESULT_PATH.read_text(encoding="utf-8"))
    assert result["model_sha256"] == sha256_of(MODEL_PATH)
    assert result["model_bytes"] == MODEL_PATH.stat().st_size
    asked = {entry["ask"]: entry["answer"] for entry in result["answers"]}
    questions = read_questions()
    assert set(asked) == {question.ask for question in questions}
    n_right = sum(not question.missing(asked[question.ask]) for question in questions)
    assert n_right == result["n_right"]
    assert n_right >= PASS_MARK


@pytest.mark.engine
def test_the_engine_answers_the_kept_out_questions(engine_bin: Path) -> None:
    marked = evaluate(engine_bin)
    wrong = [(each.ask, each.answer) for each in marked if not each.right]
    assert len(marked) - len(wrong) >= PASS_MARK, wrong
