"""Asks the demo model the twenty questions that were kept out of its training text.

    python -m meshnode.demo.evaluate --server-bin DIR [--json result.json]

DIR holds a built `llama-server`. It runs on a private unix socket, is asked greedily through
/v1/chat/completions, and stopped. An answer is right when it holds every fact of its question
(questions.toml); each fact is a list of wordings, of which one must occur, case ignored.
Exit code 0 when at least 17 of the 20 are right, 1 otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from meshnode.demo.corpus import Corpus, read_corpus

DEMO_DIR = Path(__file__).parent
MODEL_PATH = DEMO_DIR / "mesh-demo.gguf"
QUESTIONS_PATH = DEMO_DIR / "questions.toml"
RESULT_PATH = DEMO_DIR / "result.json"
PASS_MARK = 17
START_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 120.0
POLL_INTERVAL_S = 0.05


class EvaluationFailed(RuntimeError):
    """The server did not start or did not answer; says which, and what it printed last."""


@dataclass(frozen=True)
class Question:
    """A question, and the facts its answer must hold: of each inner tuple one wording."""

    ask: str
    facts: tuple[tuple[str, ...], ...]

    def missing(self, answer: str) -> tuple[tuple[str, ...], ...]:
        """The facts that the answer lacks."""
        said = answer.lower()
        return tuple(
            wordings
            for wordings in self.facts
            if not any(wording.lower() in said for wording in wordings)
        )


@dataclass(frozen=True)
class Marked:
    """One question with the model's answer and what that lacks."""

    ask: str
    answer: str
    missing: tuple[tuple[str, ...], ...]

    @property
    def right(self) -> bool:
        return not self.missing


def read_questions(path: Path = QUESTIONS_PATH) -> tuple[Question, ...]:
    """The kept-out questions."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["question"]
    return tuple(
        Question(entry["ask"], tuple(tuple(wordings) for wordings in entry["facts"]))
        for entry in entries
    )


def sha256_of(path: Path) -> str:
    """Names the model that a result belongs to."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def running_server(server_bin: Path, model: Path) -> Iterator[httpx.Client]:
    """A llama-server on a socket of its own, ready to answer; raises EvaluationFailed."""
    program = server_bin / "llama-server"
    if not program.is_file():
        raise EvaluationFailed(f"{program} does not exist: run `mesh engine build` first")
    # Socket paths are limited to about 100 bytes, so not below a possibly long TMPDIR.
    with tempfile.TemporaryDirectory(prefix="mesh-eval-", dir="/tmp") as folder:
        socket_path, log_path = Path(folder, "s.sock"), Path(folder, "log")
        command = [str(program), "-m", str(model), "--host", str(socket_path), "-c", "512"]
        command += ["-np", "1", "--no-webui"]
        with log_path.open("wb") as log:
            server = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            transport = httpx.HTTPTransport(uds=str(socket_path))
            with httpx.Client(
                transport=transport, base_url="http://localhost", timeout=ANSWER_TIMEOUT_S
            ) as client:
                _wait_until_ready(server, client, log_path)
                yield client
        finally:
            server.kill()
            server.wait()


def _wait_until_ready(
    server: subprocess.Popen[bytes], client: httpx.Client, log_path: Path
) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if client.get("/health").status_code == httpx.codes.OK:
                return
        time.sleep(POLL_INTERVAL_S)
    last = "\n".join(log_path.read_text(errors="replace").splitlines()[-15:])
    raise EvaluationFailed(f"llama-server did not get ready. It last said:\n{last}")


def ask(client: httpx.Client, question: str) -> str:
    """The model's greedy answer."""
    reply = client.post(
        "/v1/chat/completions",
        json={
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 200,
        },
    )
    if reply.status_code != httpx.codes.OK:
        raise EvaluationFailed(f"llama-server answered {reply.status_code}: {reply.text}")
    return str(reply.json()["choices"][0]["message"]["content"]).strip()


def evaluate(server_bin: Path, model: Path = MODEL_PATH) -> tuple[Marked, ...]:
    """Every question's answer and what it lacks; raises EvaluationFailed."""
    questions = read_questions()
    with running_server(server_bin, model) as client:
        answers = [ask(client, question.ask) for question in questions]
    return tuple(
        Marked(question.ask, answer, question.missing(answer))
        for question, answer in zip(questions, answers, strict=True)
    )


def result_json(marked: tuple[Marked, ...], model: Path, today: datetime.date) -> str:
    """What result.json holds; for each question also what in the corpus comes nearest to it."""
    corpus = read_corpus()
    result = {
        "date": today.isoformat(),
        "model": model.name,
        "model_sha256": sha256_of(model),
        "model_bytes": model.stat().st_size,
        "n_right": sum(each.right for each in marked),
        "n_questions": len(marked),
        "answers": [_entry(each, corpus) for each in marked],
    }
    return json.dumps(result, indent=2) + "\n"


def _entry(marked: Marked, corpus: Corpus) -> dict[str, Any]:
    likeness, nearest = corpus.nearest(marked.ask)
    learnt = {"nearest_learnt": nearest, "words_shared": round(likeness, 2)}
    return {"right": marked.right, **asdict(marked), **learnt}


def main() -> int:
    parser = argparse.ArgumentParser(description="Ask the demo model its kept-out questions.")
    parser.add_argument("--server-bin", type=Path, required=True, help="folder of llama-server")
    parser.add_argument("--model", type=Path, default=MODEL_PATH)
    parser.add_argument("--json", type=Path, help="write the result here, e.g. result.json")
    options = parser.parse_args()
    try:
        marked = evaluate(options.server_bin, options.model)
    except EvaluationFailed as failure:
        print(failure, file=sys.stderr)
        return 2
    for each in marked:
        print(f"{'right' if each.right else 'WRONG'}  {each.ask}\n       {each.answer}")
        for wordings in each.missing:
            print(f"       lacks: {' / '.join(wordings)}")
    n_right = sum(each.right for each in marked)
    print(f"{n_right} of {len(marked)} right")
    if options.json:
        today = datetime.datetime.now(datetime.UTC).date()
        text = result_json(marked, options.model, today)
        options.json.write_text(text, encoding="utf-8")
    return 0 if n_right >= PASS_MARK else 1


if __name__ == "__main__":
    sys.exit(main())
