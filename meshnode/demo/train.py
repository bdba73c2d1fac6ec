"""Trains the demo model from its corpus and writes it as GGUF, with one fixed seed.

    pip install '.[train]'
    python -m meshnode.demo.train --out meshnode/demo/mesh-demo.gguf

A decoder of the llama architecture, small enough to learn on two CPU cores in under half an hour.
It has one thing to learn: to tell which of the corpus's questions is asked, however it is worded,
and to say that question's answer. So every batch is made afresh: patterns are filled in at random,
words dropped or misspelt, case and punctuation varied, several questions strung to one chat.

Parameters live in a dict under their GGUF names, and the forward pass follows llama.cpp's
(src/models/llama.cpp): RMSNorm, rotary embedding over neighbouring pairs, SwiGLU.
The tokenizer is byte-level BPE with GPT-2's splitting rule (`tokenizer.ggml.pre = gpt-2`).
"""

from __future__ import annotations

import argparse
import importlib
import random
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshnode.demo.corpus import Corpus, Intent, normalise, read_corpus
from meshnode.demo.gguf_file import ASSISTANT, BOS, END, SPECIALS, USER, Shape, write_gguf

try:
    # Only this script needs them, so neither is a dependency that mypy or an import could see.
    torch: Any = importlib.import_module("torch")
    tokenizers: Any = importlib.import_module("tokenizers")
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is missing: pip install '.[train]' brings what training needs")

DEMO_DIR = Path(__file__).parent
SAVE_EVERY_STEPS = 250
BEGINNING_SHOWN = 12


@dataclass(frozen=True)
class Recipe:
    """How it is trained."""

    seed: int = 8090
    steps: int = 2400
    rows: int = 12
    row_tokens: int = 144
    matrix_rate: float = 0.02
    other_rate: float = 0.003
    weight_decay: float = 0.05
    dropout: float = 0.1
    new_chat: float = 0.75
    cut_answers: float = 0.85
    beginning_tokens: int = 10
    # Learning to predict questions too teaches which words are alike.
    question_loss: float = 0.2


# --- text -----------------------------------------------------------------------------------------


class Chats:
    """I make up conversations from the corpus, never with a question that is kept out of it."""

    def __init__(self, corpus: Corpus, forbidden: frozenset[str], rng: random.Random) -> None:
        self._corpus = corpus
        self._forbidden = forbidden | {normalise(q) for i in corpus.intents for q in i.kept_out}
        self._rng = rng
        self._weights = [intent.weight for intent in corpus.intents]

    def pair(self) -> tuple[str, str]:
        """One question as a user may write it, and its answer."""
        intent: Intent = self._rng.choices(self._corpus.intents, self._weights)[0]
        while True:
            question = self._corpus.sample(self._rng.choice(intent.patterns), self._rng)
            question = self._as_typed(question)
            if normalise(question) not in self._forbidden:
                return question, intent.answer

    def chance(self, share: float) -> bool:
        """True in this share of the cases."""
        return self._rng.random() < share

    def _as_typed(self, text: str) -> str:
        rng, words = self._rng, self._corpus.words
        if rng.random() < 0.2:
            text = f"{rng.choice(words['opener'])} {text}"
        if rng.random() < 0.15:
            text = f"{text} {rng.choice(words['closer'])}".replace(" ,", ",")
        if rng.random() < 0.25:
            text = _without_a_word(text, rng)
        if rng.random() < 0.12:
            text = _misspelt(text, rng)
        if rng.random() < 0.6:
            text = text[:1].upper() + text[1:]
        return text + rng.choice(("?", "?", "?", "", "", ".", "!"))


def _without_a_word(text: str, rng: random.Random) -> str:
    words = text.split()
    if len(words) > 4:
        del words[rng.randrange(len(words))]
    return " ".join(words)


def _misspelt(text: str, rng: random.Random) -> str:
    at = rng.randrange(max(1, len(text) - 1))
    swapped = text[:at] + text[at : at + 2][::-1] + text[at + 2 :]
    return rng.choice((swapped, text[:at] + text[at + 1 :], text[:at] + text[at : at + 1] * 2))


def train_tokenizer(chats: Chats, vocab: int) -> Any:
    """Byte-level BPE over made-up chats: the special tokens first, then bytes, then merges."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    lines = (line for _ in range(30_000) for line in _as_templated(*chats.pair()))
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def _as_templated(question: str, answer: str) -> tuple[str, str]:
    return f" {question}", answer


def encode_pair(tokenizer: Any, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of one exchange as the chat template writes it: what is asked, what is learnt."""
    user, assistant, end = (tokenizer.token_to_id(each) for each in (USER, ASSISTANT, END))
    asked_text, told_text = _as_templated(question, answer)
    asked = [user, *tokenizer.encode(asked_text).ids, end, assistant]
    return asked, [*tokenizer.encode(told_text).ids, end]


def make_batch(chats: Chats, tokenizer: Any, recipe: Recipe) -> tuple[Any, Any]:
    """Tokens and loss weights, both (rows, row_tokens + 1): chats one after the other."""
    length = recipe.row_tokens + 1
    tokens, weights = [], []
    for _ in range(recipe.rows):
        row: list[int] = []
        weight: list[float] = []
        while len(row) < length:
            asked, told = encode_pair(tokenizer, *chats.pair())
            if not row or chats.chance(recipe.new_chat):
                asked = [tokenizer.token_to_id(BOS), *asked]
            if chats.chance(recipe.cut_answers):
                # What is hard is to begin the right answer: spend the time on more beginnings.
                told = told[: recipe.beginning_tokens]
            row += asked + told
            # What follows an answer is the user's business.
            weight += [0.0, 0.0] + [recipe.question_loss] * (len(asked) - 2) + [1.0] * len(told)
        tokens.append(row[:length])
        weights.append(weight[:length])
    return torch.tensor(tokens), torch.tensor(weights)


# --- model ----------------------------------------------------------------------------------------


def new_parameters(shape: Shape) -> dict[str, Any]:
    """Random weights under their GGUF names; matrices are (out, in)."""
    sizes = {"token_embd": (shape.vocab, shape.width), "output": (shape.vocab, shape.width)}
    for layer in range(shape.layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            sizes[f"blk.{layer}.{name}"] = (shape.width, shape.width)
        sizes[f"blk.{layer}.ffn_gate"] = sizes[f"blk.{layer}.ffn_up"] = (shape.ffn, shape.width)
        sizes[f"blk.{layer}.ffn_down"] = (shape.width, shape.ffn)
    parameters = {}
    for name, (rows, columns) in sizes.items():
        deviation = 0.02 if name in ("token_embd", "output") else columns**-0.5
        if name.endswith(("attn_output", "ffn_down")):
            deviation /= (2 * shape.layers) ** 0.5
        parameters[f"{name}.weight"] = torch.randn(rows, columns) * deviation
    for layer in range(shape.layers):
        parameters[f"blk.{layer}.attn_norm.weight"] = torch.ones(shape.width)
        parameters[f"blk.{layer}.ffn_norm.weight"] = torch.ones(shape.width)
    parameters["output_norm.weight"] = torch.ones(shape.width)
    return {name: tensor.requires_grad_() for name, tensor in parameters.items()}


def logits(p: dict[str, Any], tokens: Any, shape: Shape, dropout: float = 0.0) -> Any:
    """Scores of the next token, (rows, length, vocab), for tokens (rows, length).

    Each <|bos|> begins a chat that sees nothing of those before it in the row.
    """
    functional = torch.nn.functional
    rows, length = tokens.shape
    head = shape.width // shape.heads
    chat = (tokens == SPECIALS.index(BOS)).cumsum(1)
    seen = (chat[:, None, :, None] == chat[:, None, None, :]).tril()
    turn = _rotation(length, head, shape.rope_base)

    def norm(x: Any, name: str) -> Any:
        return functional.rms_norm(x, (shape.width,), p[f"{name}.weight"], shape.norm_eps)

    def heads_of(x: Any, name: str) -> Any:
        y = functional.linear(x, p[f"{name}.weight"])
        return y.view(rows, length, shape.heads, head).transpose(1, 2)

    def drop(x: Any) -> Any:
        return functional.dropout(x, dropout) if dropout else x

    x = drop(functional.embedding(tokens, p["token_embd.weight"]))
    for block in (f"blk.{layer}" for layer in range(shape.layers)):
        y = norm(x, f"{block}.attn_norm")
        q, k, v = (heads_of(y, f"{block}.attn_{each}") for each in "qkv")
        y = functional.scaled_dot_product_attention(
            _rotated(q, turn), _rotated(k, turn), v, attn_mask=seen
        )
        y = y.transpose(1, 2).reshape(rows, length, shape.width)
        x = x + drop(functional.linear(y, p[f"{block}.attn_output.weight"]))
        y = norm(x, f"{block}.ffn_norm")
        gate = functional.silu(functional.linear(y, p[f"{block}.ffn_gate.weight"]))
        y = gate * functional.linear(y, p[f"{block}.ffn_up.weight"])
        x = x + drop(functional.linear(y, p[f"{block}.ffn_down.weight"]))
    return functional.linear(norm(x, "output_norm"), p["output.weight"])


def _rotation(length: int, head: int, base: float) -> Any:
    angle = torch.outer(
        torch.arange(length).float(), base ** (-torch.arange(0, head, 2).float() / head)
    )
    return torch.cos(angle), torch.sin(angle)


def _rotated(x: Any, turn: Any) -> Any:
    """Rotary embedding of neighbouring pairs, llama.cpp's LLAMA_ROPE_TYPE_NORM."""
    cos, sin = turn
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


# --- training -------------------------------------------------------------------------------------


class Muon:
    """I give matrices steps of equal size in every direction (Keller Jordan's Muon).

    The momentum is brought near an orthogonal matrix by five Newton-Schulz rounds. PyTorch's own
    does that in bfloat16, one matrix at a time, which most CPUs take seconds for.
    """

    MOMENTUM = 0.95
    ROUND = (3.4445, -4.7750, 2.0315)

    def __init__(self, matrices: list[Any], weight_decay: float) -> None:
        self._decay = weight_decay
        self._groups: dict[Any, list[Any]] = {}
        for matrix in matrices:
            self._groups.setdefault(matrix.shape, []).append(matrix)
        self._momenta = {s: torch.zeros(len(g), *s) for s, g in self._groups.items()}

    def step(self, rate: float) -> None:
        """Move every matrix against its gradient."""
        with torch.no_grad():
            for size, matrices in self._groups.items():
                gradient = torch.stack([matrix.grad for matrix in matrices])
                momentum = self._momenta[size].lerp_(gradient, 1 - self.MOMENTUM)
                direction = self._orthogonal(gradient.lerp(momentum, self.MOMENTUM))
                direction *= max(1.0, size[0] / size[1]) ** 0.5
                for matrix, change in zip(matrices, direction, strict=True):
                    matrix.mul_(1 - rate * self._decay).sub_(change, alpha=rate)

    def _orthogonal(self, x: Any) -> Any:
        tall = x.shape[-2] > x.shape[-1]
        x = x.mT if tall else x
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        a, b, c = self.ROUND
        for _ in range(5):
            square = x @ x.mT
            x = a * x + (b * square + c * square @ square) @ x
        return x.mT if tall else x


def train(
    shape: Shape,
    recipe: Recipe,
    chats: Chats,
    tokenizer: Any,
    minutes: float,
    save: Callable[[dict[str, Any], int], None],
) -> Any:
    """The trained parameters (an average over the last steps) and the last losses' mean.

    With `minutes`, the schedule follows the clock where that is ahead of the steps.
    """
    parameters = new_parameters(shape)
    average = {name: tensor.detach().clone() for name, tensor in parameters.items()}
    hidden = [t for n, t in parameters.items() if n.startswith("blk") and t.ndim == 2]
    others = [t for n, t in parameters.items() if not (n.startswith("blk") and t.ndim == 2)]
    muon = Muon(hidden, recipe.weight_decay)
    adam = torch.optim.AdamW(others, lr=recipe.other_rate, betas=(0.9, 0.98), weight_decay=0.0)
    steps, started, recent = recipe.steps, time.monotonic(), 0.0
    for step in range(steps):
        spent = (time.monotonic() - started) / 60
        fraction = max(step / steps, spent / minutes if minutes else 0.0)
        if fraction >= 1:
            break
        scale = min(1.0, (step + 1) / 50, (1 - fraction) / 0.6)
        adam.param_groups[0]["lr"] = recipe.other_rate * scale
        tokens, weights = make_batch(chats, tokenizer, recipe)
        scores = logits(parameters, tokens[:, :-1], shape, recipe.dropout)
        each = torch.nn.functional.cross_entropy(
            scores.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
        loss = (each * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        for tensor in parameters.values():
            tensor.grad = None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        adam.step()
        muon.step(recipe.matrix_rate * scale)
        keep = min(0.98, step / (step + 10))
        with torch.no_grad():
            for name, tensor in parameters.items():
                average[name].lerp_(tensor, 1 - keep)
        recent = loss.item() if step == 0 else 0.95 * recent + 0.05 * loss.item()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step + 1}/{steps}  loss {recent:.3f}  {spent:.1f} min", flush=True)
        if step % SAVE_EVERY_STEPS == SAVE_EVERY_STEPS - 1:
            save(average, step)
    return average, recent


def misread(parameters: dict[str, Any], shape: Shape, corpus: Corpus, tokenizer: Any) -> list[str]:
    """The corpus's kept-out questions (`~`) that greedy decoding does not answer word for word."""
    wrong = []
    for intent in corpus.intents:
        for question in intent.kept_out:
            asked, told = encode_pair(tokenizer, question.capitalize() + "?", intent.answer)
            row = torch.tensor([[tokenizer.token_to_id(BOS), *asked, *told]])
            with torch.no_grad():
                best = logits(parameters, row[:, :-1], shape).argmax(-1)[0]
            if best[len(asked) :].tolist() != told:
                said = tokenizer.decode(best[len(asked) :][:BEGINNING_SHOWN].tolist())
                wrong.append(f"{intent.name}: {question} ->{said}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model and write it as GGUF.")
    parser.add_argument("--out", type=Path, default=DEMO_DIR / "mesh-demo.gguf")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--minutes", type=float, default=0.0, help="stop early to keep to this")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path, help="also write weights and tokenizer here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape, recipe = Shape(), Recipe(steps=options.steps)
    torch.manual_seed(recipe.seed)
    corpus = read_corpus()
    questions = tomllib.loads((DEMO_DIR / "questions.toml").read_text(encoding="utf-8"))
    forbidden = frozenset(normalise(each["ask"]) for each in questions["question"])
    chats = Chats(corpus, forbidden, random.Random(recipe.seed))  # noqa: S311 (text, not secrets)
    tokenizer = train_tokenizer(chats, shape.vocab)

    def save(parameters: dict[str, Any], step: int) -> None:
        write_gguf(options.out, parameters, shape, tokenizer)
        if options.checkpoint:
            state = {"parameters": parameters, "tokenizer": tokenizer.to_str()}
            torch.save(state, options.checkpoint)
        wrong = misread(parameters, shape, corpus, tokenizer)
        kept_out = sum(len(intent.kept_out) for intent in corpus.intents)
        right = kept_out - len(wrong)
        print(f"{right} of the corpus's {kept_out} kept-out questions right at step {step + 1}")
        print("".join(f"    {each}\n" for each in wrong), flush=True)

    parameters, loss = train(shape, recipe, chats, tokenizer, options.minutes, save)
    save(parameters, recipe.steps - 1)
    print(f"{options.out}: {options.out.stat().st_size} bytes, loss {loss:.3f}")


if __name__ == "__main__":
    main()
