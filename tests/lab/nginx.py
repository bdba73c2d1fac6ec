"""nginx, as Debian has it, serving a folder: on loopback, or wherever its settings are used."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.lab.certificate import Certified

_CONFIG = """
daemon off;
master_process off;
pid {scratch}/pid;
error_log {scratch}/errors;
events {{ worker_connections 128; }}
http {{
    log_format sent '$bytes_sent';
    access_log {scratch}/sent sent;
    sendfile on;
    sendfile_max_chunk 2m;
    client_body_temp_path {scratch}/body;
    proxy_temp_path {scratch}/proxy;
    fastcgi_temp_path {scratch}/fastcgi;
    uwsgi_temp_path {scratch}/uwsgi;
    scgi_temp_path {scratch}/scgi;
    server {{ listen {address}; root {served}; }}
}}
"""


def nginx_program() -> str | None:
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def nginx_settings(served: Path, scratch: Path, address: str) -> str:
    """For its configuration file. address: HOST:PORT. It does not fork, so that its end is its
    process's."""
    return _CONFIG.format(scratch=scratch, served=served, address=address)


@contextmanager
def running_nginx(
    program: str,
    served: Path,
    scratch: Path,
    certified: Certified | None = None,
    token: str | None = None,
    port: int | None = None,
) -> Iterator[str]:
    """The address of the folder `served`, ending in a slash. certified: serve with TLS. token:
    serve to those alone who say ?token=. port: that one, so that a server that was gone comes back
    where it was."""
    tls = ""
    if certified is not None:
        tls = f" ssl; ssl_certificate {certified.certificate}; ssl_certificate_key {certified.key}"
    if port is None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
    config = scratch / "nginx.conf"
    settings = nginx_settings(served, scratch, f"127.0.0.1:{port}{tls}")
    if token is not None:
        refusal = f'if ($arg_token != "{token}") {{ return 403; }}'
        settings = settings.replace("root ", f"{refusal} root ")
    config.write_text(settings)
    process = subprocess.Popen([program, "-c", config, "-p", scratch, "-e", scratch / "errors"])
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError((scratch / "errors").read_text())
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                continue
        yield f"{'https' if tls else 'http'}://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait(30)
