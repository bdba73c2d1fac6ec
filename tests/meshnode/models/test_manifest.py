"""The same weights have the same name wherever they lie; one flipped byte does not."""

import os
import random
import threading
from pathlib import Path
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.errors import ModelError
from meshnode.models import manifest as manifest_module
from meshnode.models.cache import ManifestCache
from meshnode.models.facts import read_facts, shard_paths
from meshnode.models.header import TruncatedGguf
from meshnode.models.manifest import (
    BadManifest,
    DigestCancelled,
    FileChanged,
    Manifest,
    digest_model,
    engine_manifest,
    from_wire_untrusted,
    match,
    to_wire,
)
from tests.engine.synthetic import make_model


def digested(path: Path) -> Manifest:
    return digest_model(read_facts(path))


def flipped(path: Path, tensor_name: str) -> None:
    """Flips one byte of one tensor."""
    tensor = next(t for t in read_facts(path).tensors if t.name == tensor_name)
    with path.open("r+b") as file:
        file.seek(tensor.offset + tensor.nbytes // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "m.gguf", layers=2, width=64, vocab=300, heads=2, ffn=64)


def test_a_copy_has_the_same_root_and_another_seed_another(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(model.read_bytes())
    other = make_model(
        tmp_path / "other.gguf", layers=2, width=64, vocab=300, heads=2, ffn=64, seed=1
    )
    assert digested(copy).root == digested(model).root
    assert digested(other).root != digested(model).root
    assert len(digested(model).root) == 64


def test_shards_have_the_root_of_the_whole(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"layers": 2, "width": 64, "vocab": 300, "heads": 2, "ffn": 64}
    whole = digested(make_model(tmp_path / "w.gguf", **shape))
    sharded = digested(make_model(tmp_path / "s.gguf", shards=3, **shape))
    assert sharded.root == whole.root
    assert len(sharded.files) == 3
    assert {tensor.file_index for tensor in sharded.tensors} == {0, 1, 2}


def test_one_flipped_byte_costs_one_tensor(model: Path, tmp_path: Path) -> None:
    wanted = digested(model)
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(model.read_bytes())
    flipped(copy, "blk.1.ffn_up.weight")
    local = digested(copy)
    assert local.root != wanted.root
    found = match(wanted.tensors, local)
    assert found.differing == ("blk.1.ffn_up.weight",)
    assert found.missing == ()
    assert len(found.usable) == len(wanted.tensors) - 1


def test_other_names_for_the_same_weights_change_the_root(model: Path) -> None:
    known = digested(model)
    header = bytes(32)
    assert manifest_module.root_of(header, known.tensors) != known.root


def test_a_deeper_model_has_tensors_a_shallower_one_lacks(model: Path, tmp_path: Path) -> None:
    deep = make_model(tmp_path / "d.gguf", layers=3, width=64, vocab=300, heads=2, ffn=64)
    found = match(digested(deep).tensors, digested(model))
    assert "blk.2.ffn_up.weight" in found.missing


def test_progress_runs_from_something_to_all(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "READ_BYTES", 1000)
    facts = read_facts(model)
    told: list[tuple[int, int]] = []
    digest_model(facts, lambda done, total: told.append((done, total)))
    assert told[-1] == (facts.weight_bytes, facts.weight_bytes)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert len(told) > facts.weight_bytes // 1000


def test_a_digest_stops_when_nobody_wants_it(model: Path) -> None:
    asked = []

    def unwanted() -> bool:
        asked.append(1)
        return len(asked) == 5

    with pytest.raises(DigestCancelled):
        digest_model(read_facts(model), None, unwanted)
    assert len(asked) == 5


def test_a_file_written_to_meanwhile_is_told(model: Path) -> None:
    def touch(done: int, total: int) -> None:
        if done == total:
            os.utime(model, ns=(1, 1))

    with pytest.raises(FileChanged, match="changed while it was read"):
        digest_model(read_facts(model), touch)


def test_a_file_cut_or_gone_meanwhile_is_told(model: Path, tmp_path: Path) -> None:
    facts = read_facts(model)
    os.truncate(model, 3000)
    with pytest.raises(TruncatedGguf, match="ended while it was read"):
        digest_model(facts)
    model.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        digest_model(facts)


def test_a_file_that_goes_between_looking_and_opening_is_told(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = read_facts(model)
    real = manifest_module.stamp

    def vanish(path: Path) -> object:
        found = real(path)
        path.unlink()
        return found

    monkeypatch.setattr(manifest_module, "stamp", vanish)
    with pytest.raises(ModelError, match="cannot be read"):
        digest_model(facts)


def test_the_engines_manifest_says_where_each_usable_tensor_lies(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"layers": 2, "width": 64, "vocab": 300, "heads": 2, "ffn": 64}
    local = digested(make_model(tmp_path / "with\ttab.gguf", shards=2, **shape))
    text = engine_manifest("ab" * 32, local, local.tensors[:3])
    lines = text.splitlines()
    assert lines[:2] == ["mesh-gguf\t1", "root\t" + "ab" * 32]
    for position, line in enumerate(lines[2:4]):
        kind, number, size, mtime, inode, device, path = line.split("\t", 6)
        found = os.stat(path)
        assert (kind, number) == ("file", str(position))
        assert [int(n) for n in (size, mtime, inode, device)] == [
            found.st_size,
            found.st_mtime_ns,
            found.st_ino,
            found.st_dev,
        ]
    for line, tensor in zip(lines[4:], local.tensors[:3], strict=True):
        kind, index, offset, nbytes, type_, *ne, name = line.split("\t")
        assert kind == "tensor"
        assert (int(index), int(offset), int(nbytes)) == (
            tensor.file_index,
            tensor.offset,
            tensor.nbytes,
        )
        assert (int(type_), tuple(map(int, ne)), name) == (tensor.type, tensor.ne, tensor.name)


def test_a_path_in_two_lines_cannot_be_offered(tmp_path: Path) -> None:
    local = digested(make_model(tmp_path / "two\nlines.gguf", layers=1))
    with pytest.raises(ModelError, match="rename it"):
        engine_manifest(local.root, local, local.tensors)


def test_what_is_wanted_survives_the_wire_and_matches(model: Path) -> None:
    local = digested(model)
    wanted = from_wire_untrusted(to_wire(local))
    assert wanted.root == local.root
    assert match(wanted.tensors, local).usable == local.tensors


ROW = ["blk.0.x", 0, 4, 1, 1, 1, 16, bytes(32)]


def row(place: int, value: object) -> list[object]:
    return [*ROW[:place], value, *ROW[place + 1 :]]


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\xff",
        cbor2.dumps([2, bytes(32), []]),
        cbor2.dumps([1, bytes(31), []]),
        cbor2.dumps([1, "root", []]),
        cbor2.dumps([1, bytes(32), [[]]]),
        cbor2.dumps([1, bytes(32), 7]),
        cbor2.dumps([1, bytes(32), [row(0, "")]]),
        cbor2.dumps([1, bytes(32), [row(0, "n" * 64)]]),
        cbor2.dumps([1, bytes(32), [row(0, "a\tb")]]),
        cbor2.dumps([1, bytes(32), [row(0, "a\nroot\tb")]]),
        cbor2.dumps([1, bytes(32), [row(1, -1)]]),
        cbor2.dumps([1, bytes(32), [row(1, 1 << 16)]]),
        cbor2.dumps([1, bytes(32), [row(2, True)]]),
        cbor2.dumps([1, bytes(32), [row(2, 2**64)]]),
        cbor2.dumps([1, bytes(32), [[*ROW[:2], 2**40, 2**40, 1, 1, 16, bytes(32)]]]),
        cbor2.dumps([1, bytes(32), [row(6, 1.5)]]),
        cbor2.dumps([1, bytes(32), [row(7, bytes(31))]]),
    ],
)
def test_a_damaged_wish_is_refused(message: bytes) -> None:
    with pytest.raises(BadManifest):
        from_wire_untrusted(message)


@given(st.binary(max_size=100), st.integers(0, 10**6))
def test_no_bytes_upset_the_wishes_parser(data: bytes, seed: int) -> None:
    mutated = bytearray(cbor2.dumps([1, bytes(32), [ROW, ROW]]))
    rng = random.Random(seed)
    for _ in range(3):
        mutated[rng.randrange(len(mutated))] = rng.randrange(256)
    for message in (data, bytes(mutated)):
        try:
            from_wire_untrusted(message)
        except BadManifest:
            continue


# -- the cache --------------------------------------------------------------------------------


class Count:
    """Counts the bytes that were digested."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, done: int, total: int) -> None:
        self.calls += 1


def kept(tmp_path: Path) -> ManifestCache:
    folder = tmp_path / "cache"
    folder.mkdir(exist_ok=True)
    return ManifestCache(folder)


def test_a_model_is_digested_once(model: Path, tmp_path: Path) -> None:
    first, second = Count(), Count()
    made = kept(tmp_path).manifest(read_facts(model), first)
    again = kept(tmp_path).manifest(read_facts(model), second)
    assert again == made
    assert first.calls > 0
    assert second.calls == 0


@pytest.mark.parametrize("change", ["touched", "replaced", "grown"])
def test_a_changed_file_is_digested_anew(model: Path, tmp_path: Path, change: str) -> None:
    kept(tmp_path).manifest(read_facts(model))
    if change == "touched":
        os.utime(model, ns=(1, 1))
    elif change == "replaced":
        copy = tmp_path / "copy"
        copy.write_bytes(model.read_bytes())
        found = model.stat()
        os.utime(copy, ns=(found.st_atime_ns, found.st_mtime_ns))
        copy.replace(model)
    else:
        times = model.stat()
        with model.open("ab") as file:
            file.write(b"x")
        os.utime(model, ns=(times.st_atime_ns, times.st_mtime_ns))
    count = Count()
    kept(tmp_path).manifest(read_facts(model), count)
    assert count.calls > 0


def test_another_device_number_after_a_boot_is_no_change(model: Path, tmp_path: Path) -> None:
    cache = kept(tmp_path)
    made = cache.manifest(read_facts(model))
    elsewhere = [manifest_module.FileStamp(**{**vars(f), "device": 9}) for f in made.files]
    cache.put(Manifest(made.root, made.header_digest, tuple(elsewhere), made.tensors))
    assert cache.get(read_facts(model)) == made


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "digest", "format", "header"])
def test_a_damaged_entry_is_as_good_as_none(model: Path, tmp_path: Path, damage: str) -> None:
    cache = kept(tmp_path)
    made = cache.manifest(read_facts(model))
    (entry,) = (tmp_path / "cache").iterdir()
    data = entry.read_bytes()
    version, root, header, stamps, digests = cbor2.loads(data)
    if damage == "digest":
        digests["output.weight"] = bytes(32)
    entry.write_bytes(
        {
            "cut": data[:-5],
            "noise": b"\xff" * 50,
            "empty": b"",
            "digest": cbor2.dumps([version, root, header, stamps, digests]),
            "format": cbor2.dumps([9, root, header, stamps, digests]),
            "header": cbor2.dumps([version, root, bytes(32), stamps, digests]),
        }[damage]
    )
    assert cache.get(read_facts(model)) is None
    assert cache.manifest(read_facts(model)) == made
    assert cache.get(read_facts(model)) == made


def test_two_digests_at_once_do_no_harm(model: Path, tmp_path: Path) -> None:
    results: list[Manifest] = []
    facts = read_facts(model)
    workers = [
        threading.Thread(target=lambda: results.append(kept(tmp_path).manifest(facts)))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4
    assert len(set(results)) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_digests_that_cannot_be_kept_are_still_good(model: Path, tmp_path: Path) -> None:
    gone = ManifestCache(tmp_path / "gone")
    assert gone.manifest(read_facts(model)) == digested(model)


def test_a_path_that_is_no_text_can_be_kept(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m.gguf", layers=1)
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.gguf"))
    path.rename(odd)
    cache = kept(tmp_path)
    assert cache.manifest(read_facts(odd)) == cache.get(read_facts(odd))


def test_a_model_whose_shard_went_is_told(tmp_path: Path) -> None:
    first = make_model(tmp_path / "s.gguf", shards=2)
    facts = read_facts(first)
    shard_paths(first)[1].unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        kept(tmp_path).get(facts)
