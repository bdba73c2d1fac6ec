"""What a user may write to say where a model comes from."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.errors import UsageError
from meshnode.models.pull.reference import (
    HubReference,
    MeshReference,
    OllamaReference,
    UrlReference,
    parse_reference,
)


def test_a_file_of_hugging_face_with_its_folder_and_revision() -> None:
    assert parse_reference("hf:org/repo/m.gguf") == HubReference("org/repo", ("m.gguf",))
    found = parse_reference("hf:org/repo.x/Q4/m.gguf@refs/pr/1")
    assert found == HubReference("org/repo.x", ("Q4/m.gguf",), "refs/pr/1")
    assert str(found) == "hf:org/repo.x/Q4/m.gguf@refs/pr/1"


def test_one_shard_stands_for_all() -> None:
    found = parse_reference("hf:org/repo/big/m-00002-of-00003.gguf")
    names = tuple(f"big/m-0000{number}-of-00003.gguf" for number in (1, 2, 3))
    assert found == HubReference("org/repo", names)
    web = parse_reference("https://host/a%20b/m-00001-of-00002.gguf?key=1")
    assert isinstance(web, UrlReference)
    assert [url.target for url in web.urls] == [
        "/a%20b/m-00001-of-00002.gguf?key=1",
        "/a%20b/m-00002-of-00002.gguf?key=1",
    ]


def test_a_password_in_an_address_is_not_in_its_text() -> None:
    assert str(parse_reference("https://me:hunter2@host/m.gguf")) == "https://host/m.gguf"


@pytest.mark.parametrize(
    ("text", "path", "tag"),
    [
        ("ollama:llama3.2", "library/llama3.2", "latest"),
        ("ollama:llama3.2:1b-instruct-q4_K_M", "library/llama3.2", "1b-instruct-q4_K_M"),
        ("ollama:Someone/Their-Model:8b", "someone/their-model", "8b"),
    ],
)
def test_a_model_of_ollama(text: str, path: str, tag: str) -> None:
    found = parse_reference(text)
    assert isinstance(found, OllamaReference)
    assert (found.path, found.tag) == (path, tag)
    assert parse_reference(str(found)) == found


def test_a_model_of_peers() -> None:
    assert parse_reference("mesh:llama 3") == MeshReference("llama 3")
    assert str(MeshReference("x")) == "mesh:x"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "model.gguf",
        "/path/model.gguf",
        "C:\\model.gguf",
        "s3://bucket/x",
        "mesh:",
        "mesh:a\nb",
        "hf:repo/x.gguf",
        "hf:org/repo",
        "hf:org/repo/",
        "hf:org/../x.gguf",
        "hf:org/repo/../x.gguf",
        "hf:org/repo/x.gguf@",
        "hf:org/repo/m-00003-of-00002.gguf",
        "hf:-x/repo/m.gguf",
        "ollama:",
        "ollama:a/b/c",
        "ollama:../x",
        "ollama:a:b:c",
        "http://",
        "https://[/x",
    ],
)
def test_what_is_no_reference_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(UsageError):
        parse_reference(text)


@given(st.sampled_from(["", "hf:", "hf:a/b/", "ollama:", "mesh:", "https://h/"]), st.text())
def test_whatever_is_written_parses_or_is_refused(kind: str, text: str) -> None:
    try:
        found = parse_reference(kind + text)
    except UsageError:
        return
    assert str(found)
