"""What the demo model learns: questions people may ask about mesh, and the one answer to each.

`*.txt` hold the intents, `words.inc` the words that may stand for each other. An intent is

    = name            a new intent
    ! answer          what the model says, word for word
    ? pattern         questions for training; `[a|b]` is one of the alternatives (one may be
                      empty), `{machine}` one line of `words.inc`
    ~ question        a question kept out of training, to see while tuning how well it generalises
    * 2               how often the intent is drawn, relative to the others (1 unless told)

Everything is written in lower case where a user would be careless; `train.py` varies case,
punctuation and spelling.
"""

from __future__ import annotations

import functools
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

CORPUS_DIR = Path(__file__).parent
CHOICE = re.compile(r"\[([^\[\]]*)\]|\{(\w+)\}")


class BadCorpus(ValueError):
    """A line of the corpus that says nothing the reader understands."""


@dataclass
class Intent:
    """One thing a user may want to know, the ways to ask for it, and the answer."""

    name: str
    answer: str = ""
    patterns: list[str] = field(default_factory=list)
    kept_out: list[str] = field(default_factory=list)
    weight: float = 1.0


@dataclass(frozen=True)
class Corpus:
    """All intents, and the words (`{name}` in a pattern) that may stand for each other."""

    intents: tuple[Intent, ...]
    words: dict[str, tuple[str, ...]]

    def alternatives(self, match: re.Match[str]) -> tuple[str, ...]:
        """What may stand in the place of one `[a|b]` or `{word}`."""
        choice, word = match.groups()
        if word is None:
            return tuple(choice.split("|"))
        if word not in self.words:
            raise BadCorpus(f"words.inc has no line for {{{word}}}")
        return self.words[word]

    def sample(self, pattern: str, rng: random.Random) -> str:
        """One question made from a pattern."""
        text = CHOICE.sub(lambda match: rng.choice(self.alternatives(match)), pattern)
        return " ".join(text.split())

    def matcher(self, pattern: str) -> re.Pattern[str]:
        """A regular expression for everything the pattern can make, in `normalise`d form."""
        parts: list[str] = []
        end = 0
        for match in CHOICE.finditer(pattern):
            parts.append(re.escape(normalise(pattern[end : match.start()])))
            options = "|".join(re.escape(normalise(each)) for each in self.alternatives(match))
            parts.append(f"(?:{options})")
            end = match.end()
        parts.append(re.escape(normalise(pattern[end:])))
        return re.compile(r"\ *".join(part for part in parts if part))

    def nearest(self, question: str) -> tuple[float, str]:
        """The question the corpus can make whose words are most like this one's, and how like.

        Shared words over all words of both, 0 to 1; each slot of a pattern is filled in turn with
        what comes closest.
        """
        wanted = frozenset(normalise(question).split())
        made = (
            self._nearest_of(pattern, wanted)
            for intent in self.intents
            for pattern in (*intent.patterns, *intent.kept_out)
        )
        return max(made)

    def _nearest_of(self, pattern: str, wanted: frozenset[str]) -> tuple[float, str]:
        while match := CHOICE.search(pattern):
            before, after = pattern[: match.start()], pattern[match.end() :]
            filled = [f"{before}{each}{after}" for each in self.alternatives(match)]
            pattern = max(filled, key=lambda text: _likeness(CHOICE.sub(" ", text), wanted))
        return _likeness(pattern, wanted), " ".join(pattern.split())

    @functools.cached_property
    def _matchers(self) -> dict[str, re.Pattern[str]]:
        questions = [q for each in self.intents for q in (*each.patterns, *each.kept_out)]
        return {question: self.matcher(question) for question in questions}

    def can_make(self, question: str) -> str | None:
        """The pattern or kept-out question that makes this question, if there is one."""
        forms = self._without_asides(normalise(question))
        for pattern, matcher in self._matchers.items():
            if any(matcher.fullmatch(form) for form in forms):
                return pattern
        return None

    def _without_asides(self, question: str) -> set[str]:
        openers = ["", *(f"{normalise(each)} " for each in self.words["opener"])]
        closers = ["", *(f" {normalise(each)}" for each in self.words["closer"])]
        headless = {question.removeprefix(opener) for opener in openers}
        return {form.removesuffix(closer) for form in headless for closer in closers}


def normalise(text: str) -> str:
    """Lower case, words and numbers only: questions that differ less than that are the same."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower().replace("'", "")))


def _likeness(text: str, wanted: frozenset[str]) -> float:
    words = frozenset(normalise(text).split())
    return len(words & wanted) / len(words | wanted)


def read_corpus(folder: Path = CORPUS_DIR) -> Corpus:
    """Every intent of the folder's `*.txt`; raises BadCorpus at a line that makes no sense."""
    words: dict[str, tuple[str, ...]] = {}
    for line in _lines(folder / "words.inc"):
        name, _, options = line.partition("=")
        words[name.strip()] = tuple(option.strip() for option in options.split("|"))
    intents: list[Intent] = []
    for path in sorted(folder.glob("*.txt")):
        for line in _lines(path):
            _take(line, intents)
    for intent in intents:
        if not intent.answer or not intent.patterns:
            raise BadCorpus(f"{intent.name} needs an answer (!) and questions (?)")
    return Corpus(tuple(intents), words)


def _lines(path: Path) -> list[str]:
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _take(line: str, intents: list[Intent]) -> None:
    mark, text = line[0], line[1:].strip()
    if mark == "=":
        intents.append(Intent(text))
    elif mark == "!":
        intents[-1].answer = text
    elif mark == "?":
        intents[-1].patterns.append(text)
    elif mark == "~":
        intents[-1].kept_out.append(text)
    elif mark == "*":
        intents[-1].weight = float(text)
    else:
        raise BadCorpus(f"no mark (= ! ? ~ *) at the start of: {line}")
