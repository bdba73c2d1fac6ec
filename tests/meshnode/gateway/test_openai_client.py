"""The `openai` client, unchanged, against the gateway before a real llama-server."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import httpx
import openai
import pytest
import trio
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

from tests.meshnode.gateway.conftest import Gateway
from tests.meshnode.gateway.engine_server import (
    CONTEXT_TOKENS,
    SLOTS,
    LlamaServer,
    running_llama_server,
)

pytestmark = pytest.mark.engine

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]
NO_END = {"ignore_eos": True}
"""The model says what comes up; now and then that would be the end."""
ENDLESS = {**NO_END, "max_tokens": CONTEXT_TOKENS}
EXACT = {"cache_prompt": False}
"""A prompt taken from the cache is computed in other batches, which may change the last bit."""
SWITCH: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "switch_light",
        "parameters": {
            "type": "object",
            "properties": {"on": {"type": "boolean"}},
            "required": ["on"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def llama(engine_bin: Path) -> Iterator[LlamaServer]:
    with (
        tempfile.TemporaryDirectory(prefix="gw-", dir="/tmp") as name,
        running_llama_server(engine_bin, Path(name)) as server,
    ):
        yield server


@pytest.fixture
async def client(gateway: Gateway, llama: LlamaServer) -> AsyncIterator[openai.AsyncOpenAI]:
    gateway.node.serve_from(llama.path)
    url = f"{gateway.url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as made:
        yield made


async def test_chat_answers_and_tells_what_it_used(
    gateway: Gateway, client: openai.AsyncOpenAI
) -> None:
    answer = await client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=8, extra_body=NO_END
    )
    assert answer.object == "chat.completion"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    ((tokens, seconds),) = gateway.node.generated
    assert tokens == 8
    assert seconds > 0


async def test_plain_completions_and_the_list_of_models(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(
        model="tiny", prompt="w1 w2", max_tokens=4, extra_body=NO_END
    )
    assert answer.choices[0].finish_reason == "length"
    models = await client.models.list()
    assert [model.id for model in models.data] == ["tiny"]


async def test_a_stream_says_what_the_whole_answer_says(
    gateway: Gateway, client: openai.AsyncOpenAI
) -> None:
    whole = await client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=24, temperature=0, extra_body=EXACT
    )
    stream = await client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=EXACT,
    )
    chunks = [chunk async for chunk in stream]
    said = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(said) == whole.choices[0].message.content
    assert len(said) > 12
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 24
    assert [tokens for tokens, _ in gateway.node.generated] == [24, 24]


async def test_stop_ends_the_answer_before_the_word(client: openai.AsyncOpenAI) -> None:
    async def say(stop: str | None) -> tuple[str, str]:
        answer = await client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            max_tokens=24,
            temperature=0,
            stop=stop,
            extra_body=EXACT,
        )
        return answer.choices[0].message.content or "", answer.choices[0].finish_reason

    free, _ = await say(None)
    word = re.findall(r"[!-~]{2,}", free)[-1]
    said, reason = await say(word)
    assert reason == "stop"
    assert said == free[: free.index(word)]


async def test_the_same_seed_says_the_same_and_another_does_not(
    client: openai.AsyncOpenAI,
) -> None:
    async def say(seed: int) -> str | None:
        answer = await client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=16, temperature=1, seed=seed, extra_body=EXACT
        )
        return answer.choices[0].message.content

    first = await say(1)
    assert await say(1) == first
    assert await say(2) != first


async def test_logprobs_come_with_their_alternatives(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=4, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    assert all(len(token.top_logprobs) == 3 for token in logprobs.content)
    assert all(token.logprob <= 0 for token in logprobs.content)


async def test_a_json_schema_is_kept_to(client: openai.AsyncOpenAI) -> None:
    function = SWITCH["function"]
    answer = await client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        max_tokens=200,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "light", "strict": True, "schema": function["parameters"]},
        },
    )
    value = json.loads(answer.choices[0].message.content or "")
    assert set(value) == {"on"}
    assert isinstance(value["on"], bool)


async def test_a_required_tool_is_called(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=300, tools=[SWITCH], tool_choice="required"
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "switch_light"
    assert isinstance(json.loads(call.function.arguments)["on"], bool)


async def test_a_tool_call_can_be_streamed(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        max_tokens=300,
        tools=[SWITCH],
        tool_choice="required",
        stream=True,
    )
    deltas = [chunk.choices[0].delta async for chunk in stream if chunk.choices]
    calls = [call.function for delta in deltas for call in delta.tool_calls or []]
    assert "".join(call.name or "" for call in calls if call) == "switch_light"
    arguments = "".join(call.arguments or "" for call in calls if call)
    assert isinstance(json.loads(arguments)["on"], bool)


async def test_a_bad_parameter_is_told_in_llama_servers_words(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        await client.chat.completions.create(
            model="tiny", messages=HELLO, extra_body={"max_tokens": "many"}
        )


async def test_embeddings_without_the_option_are_a_501_that_says_so(
    client: openai.AsyncOpenAI,
) -> None:
    with pytest.raises(openai.InternalServerError, match="--embeddings") as refused:
        await client.embeddings.create(model="tiny", input="hello")
    assert refused.value.status_code == 501


async def test_eight_requests_at_once_are_all_answered(client: openai.AsyncOpenAI) -> None:
    answers: dict[int, str] = {}

    async def ask(seed: int) -> None:
        stream = await client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=64, seed=seed, stream=True
        )
        text = [chunk.choices[0].delta.content or "" async for chunk in stream]
        answers[seed] = "".join(text)

    async with trio.open_nursery() as asking:
        for seed in range(8):
            asking.start_soon(ask, seed)
    assert len(set(answers.values())) == 8


async def ask_for_ever(client: openai.AsyncOpenAI, *, stream: bool) -> None:
    answer = await client.chat.completions.create(
        model="tiny", messages=HELLO, stream=stream, extra_body=ENDLESS
    )
    if isinstance(answer, openai.AsyncStream):
        async for _ in answer:
            pass


BOTH = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@pytest.fixture
def own_llama(engine_bin: Path, socket_folder: Path) -> Iterator[LlamaServer]:
    """A server whose log speaks of this test only, and that may be killed."""
    with running_llama_server(engine_bin, socket_folder) as server:
        yield server


@BOTH
async def test_cancelling_frees_the_slot(
    gateway: Gateway, client: openai.AsyncOpenAI, own_llama: LlamaServer, stream: bool
) -> None:
    gateway.node.serve_from(own_llama.path)
    async with trio.open_nursery() as asking:
        asking.start_soon(partial(ask_for_ever, client, stream=stream))
        await own_llama.logs("processing task")
        asking.cancel_scope.cancel()
    await own_llama.logs("cancel task")
    await own_llama.logs("stop processing")
    transport = httpx.AsyncHTTPTransport(uds=str(own_llama.path))
    async with httpx.AsyncClient(transport=transport) as past_the_gateway:
        slots = (await past_the_gateway.get("http://localhost/slots")).json()
        assert [slot["is_processing"] for slot in slots] == [False] * SLOTS


@BOTH
async def test_a_killed_server_ends_requests_with_an_error_and_then_503(
    gateway: Gateway,
    client: openai.AsyncOpenAI,
    own_llama: LlamaServer,
    stream: bool,
    nursery: trio.Nursery,
) -> None:
    what = "llama-server was killed; starting it again"

    async def kill_when_busy() -> None:
        await own_llama.logs("processing task")
        own_llama.process.kill()
        await trio.to_thread.run_sync(own_llama.process.wait)
        gateway.node.lose(what)

    gateway.node.serve_from(own_llama.path)
    nursery.start_soon(kill_when_busy)
    with pytest.raises(openai.APIError, match=what):
        await ask_for_ever(client, stream=stream)
    with pytest.raises(openai.InternalServerError, match=what) as refused:
        await client.chat.completions.create(model="tiny", messages=HELLO)
    assert refused.value.status_code == 503
    assert refused.value.response.headers["retry-after"] == "7"
