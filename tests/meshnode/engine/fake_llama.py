"""A llama.cpp in miniature: the same four targets, one source file, a series of one patch.

What is built from it is real: cmake, ninja and the compiler run.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

CMAKE = """\
cmake_minimum_required(VERSION 3.14)
project(fake CXX)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
foreach(name llama-server ggml-rpc-server llama-bench llama-cli)
    add_executable(${name} main.cpp)
endforeach()
"""
MAIN = '#include <cstdio>\n\nint main() {\n    std::puts("stock");\n}\n'
PATCH = """\
From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
From: mesh <mesh@localhost>
Date: Thu, 1 Jan 2026 00:00:00 +0000
Subject: [PATCH] Say who we are


diff --git a/main.cpp b/main.cpp
index {old}..{new} 100644
--- a/main.cpp
+++ b/main.cpp
@@ -1,5 +1,6 @@
 #include <cstdio>
+#include "mesh.h"
{blank}
 int main() {{
-    std::puts("stock");
+    std::puts(MESH_NAME);
 }}
diff --git a/mesh.h b/mesh.h
new file mode 100644
index 0000000000000000000000000000000000000000..{header}
--- /dev/null
+++ b/mesh.h
@@ -0,0 +1 @@
+#define MESH_NAME "patched"
"""
PATCH_NAME = "0001-Say-who-we-are.patch"


def blob_id(text: str) -> str:
    content = text.encode()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def patch_text() -> str:
    patched = MAIN.replace("<cstdio>\n", '<cstdio>\n#include "mesh.h"\n')
    patched = patched.replace('"stock"', "MESH_NAME")
    header = '#define MESH_NAME "patched"\n'
    return PATCH.format(blank=" ", old=blob_id(MAIN), new=blob_id(patched), header=blob_id(header))


def files() -> dict[str, str]:
    return {
        "CMakeLists.txt": CMAKE,
        "ggml/CMakeLists.txt": "",
        "tools/server/CMakeLists.txt": "",
        "models/vocabulary.gguf": "not needed by any build",
        "main.cpp": MAIN,
    }


def write_checkout(folder: Path) -> Path:
    for name, text in files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def write_sdist(path: Path, extra: dict[str, tarfile.TarInfo] | None = None) -> str:
    """Write an sdist that carries the tree; returns its sha256."""
    with tarfile.open(path, "w:gz") as archive:
        for name, text in {**files(), ".git": "gitdir: elsewhere"}.items():
            member = tarfile.TarInfo(f"fake-1.0/vendor/llama.cpp/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
        for name, member in (extra or {}).items():
            member.name = f"fake-1.0/vendor/llama.cpp/{name}"
            archive.addfile(member)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_patches(folder: Path, sha256: str, patch: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "upstream.toml").write_text(
        f'package = "mesh-fake-llama"\nversion = "1.0"\nsha256 = "{sha256}"\n'
        'subdir = "vendor/llama.cpp"\n'
    )
    (folder / PATCH_NAME).write_text(patch if patch is not None else patch_text())
    (folder / "series").write_text(f"{PATCH_NAME}\n")
    return folder
