"""A real llama-server on a unix socket, with a small random model, for whoever tests HTTP."""

from __future__ import annotations

import queue
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from tests.engine.synthetic import make_model

SLOTS = 4
CONTEXT_TOKENS = 4096
LINE_TIMEOUT_S = 20

TEMPLATE = """\
{%- for message in messages -%}
<|start_header_id|>{{ message.role }}<|end_header_id|>

{% if message.tool_calls %}{% for call in message.tool_calls %}>>>{{ call.function.name }}
{{ call.function.arguments }}{% endfor %}{% else %}>>>all
{{ message.content }}{% endif %}<|eot_id|>
{%- endfor -%}
{%- if tools %}{{ tools | tojson }}{% endif -%}
{%- if add_generation_prompt -%}<|start_header_id|>assistant<|end_header_id|>

>>>{%- endif -%}
"""
"""llama-server derives from this that every answer names its recipient first (`>>>all`), so that
with `tool_choice="required"` its grammar leaves even random weights nothing but a tool call."""


class LlamaServer:
    """A running llama-server: its socket, its process, and its log line by line."""

    def __init__(self, path: Path, process: subprocess.Popen[bytes]) -> None:
        self.path = path
        self.process = process
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read_log, daemon=True).start()

    def wait_for_line(self, part: str) -> None:
        """Returns when the next line with `part` in it has been logged; blocks until then."""
        passed = []
        while True:
            try:
                passed.append(self._lines.get(timeout=LINE_TIMEOUT_S))
            except queue.Empty:
                raise AssertionError(f"no {part!r} in:\n" + "".join(passed[-30:])) from None
            if part in passed[-1]:
                return

    async def logs(self, part: str) -> None:
        await trio.to_thread.run_sync(self.wait_for_line, part, abandon_on_cancel=True)

    def _read_log(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.decode(errors="replace"))


@contextmanager
def running_llama_server(engine_bin: Path, folder: Path) -> Iterator[LlamaServer]:
    """A llama-server that is ready. Its model takes a few seconds for `CONTEXT_TOKENS`."""
    model = make_model(folder / "tiny.gguf", layers=6, width=512, ffn=1024)
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    path = folder / "llama.sock"
    command = [str(engine_bin / "llama-server"), "--model", str(model), "--alias", "tiny"]
    command += ["--host", str(path), "--parallel", str(SLOTS), "--threads", "1"]
    command += ["--ctx-size", str(CONTEXT_TOKENS * SLOTS), "--offline", "--no-ui", "--slots"]
    command += ["--jinja", "--chat-template-file", str(template)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        server = LlamaServer(path, process)
        server.wait_for_line("listening on")
        yield server
    finally:
        process.kill()
        process.wait()
