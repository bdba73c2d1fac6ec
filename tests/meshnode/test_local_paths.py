"""What goes to other machines names no folder of this one."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshnode.local_paths import without_paths

MODELS = Path("/mnt/My Disk/of ann/models")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            f"pulling m needs 3.0 GiB more in {MODELS}/m, and 1.0 GiB are free there",
            "pulling m needs 3.0 GiB more in …/m, and 1.0 GiB are free there",
        ),
        (
            "no space left to write /home/ann/x/m.gguf: free some",
            "no space left to write …: free some",
        ),
        ("Its log: /var/log/ann/rpc.log", "Its log: …"),
        ("(/opt/a/b), '/opt/a/b' and ~/models/m.gguf.", "(…), '…' and …"),
        (f"{Path.home()}/m/slice.cbor is damaged", "…/m/slice.cbor is damaged"),
        (
            "ben finds another file at https://example.org:8080/ann/m.gguf?… than was seen",
            "ben finds another file at https://example.org:8080/ann/m.gguf?… than was seen",
        ),
        (f"https://example.org{Path.home()}/m.gguf", f"https://example.org{Path.home()}/m.gguf"),
        (f"{Path.home()}-other/x is full", "… is full"),
        ("hf:org/repo/m.gguf and blk.0/1, 20 tok/s", "hf:org/repo/m.gguf and blk.0/1, 20 tok/s"),
        ("start it with --allow-pull hub / url", "start it with --allow-pull hub / url"),
    ],
)
def test_folders_are_left_out_and_all_else_stays(text: str, shown: str) -> None:
    assert without_paths(text, [MODELS]) == shown


def test_what_a_link_leads_to_is_left_out_too(tmp_path: Path) -> None:
    (tmp_path / "real one").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real one")
    text = f"{tmp_path}/real one/m.gguf cannot be read"
    assert without_paths(text, [tmp_path / "link"]) == "…/m.gguf cannot be read"
