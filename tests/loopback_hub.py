"""A small Hub on loopback, and the real huggingface_hub client in a process of its own.

The Hub serves the routes the client uses (model info, file tree, resolve with redirects to a CDN on another host,
ranges) and can be told to fail. The client reads HF_ENDPOINT once, when it is imported: hence the process; it is told
to do without hf_xet, though the Hub advertises it as the real one does.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LFS = (".safetensors", ".gguf", ".bin")


@dataclass
class Repo:
    """One repository: the files of each commit, its branches, and what goes wrong with it.

    `fail` gives, for "info", "resolve" or "cdn", the status and the X-Error-Code that requests get, how many of them,
    and how many are answered well before. `cut` gives how many downloads break after half of what is left: "close" is
    an orderly end, "reset" is not. `garble` changes what is sent: "content" keeps the size, "size" does not.
    """

    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str]
    fail: dict[str, list[Any]] = field(default_factory=dict)
    cut: list[str] = field(default_factory=list)
    garble: str = ""
    unlisted: tuple[str, ...] = ()  # listed by the API, but absent


def repo(files: dict[str, bytes], **faults: Any) -> Repo:
    commit = hashlib.sha1(repr(sorted(files)).encode() + os.urandom(8)).hexdigest()
    return Repo({commit: files}, {"main": commit}, **faults)


class Hub:
    """Two servers: the Hub itself and its CDN; and a log of what was asked of them."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.log: list[tuple[str, str, dict[str, str]]] = []
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), self.handler(cdn)) for cdn in (False, True)]
        self.url = f"http://127.0.0.1:{self.servers[0].server_port}"
        self.cdn = f"http://localhost:{self.servers[1].server_port}"  # another host, by name as well as by port
        for server in self.servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def asked(self, name: str) -> list[tuple[str, str, dict[str, str]]]:
        """The requests for a repository: method, path, headers."""
        return [request for request in self.log if f"/{name}/" in f"{request[1]}/"]

    def handler(self, cdn: bool) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                hub.log.append((self.command, path, {key.lower(): value for key, value in self.headers.items()}))
                if cdn:
                    self.blob(path)
                elif match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(revision|tree)/([^/]+))?", path):
                    self.info(match[1], match[2] == "tree", match[3] or "main")
                elif match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
                    self.resolve(*match.groups())
                else:
                    self.reply(404, b"{}")

            def reply(self, status: int, body: bytes = b"", **headers: object) -> None:
                self.send_response(status)
                headers.setdefault("Content_Length", len(body))
                for key, value in headers.items():
                    self.send_header(key.replace("_", "-"), str(value))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def failed(self, found: Repo | None, kind: str, revision: str = "main") -> bool:
                if found is None:
                    self.reply(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
                elif due(found.fail.get(kind)):
                    status, code = found.fail[kind][:2]
                    self.reply(status, X_Error_Code=code) if code else self.reply(status)
                elif revision not in found.branches and revision not in found.commits:
                    self.reply(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
                else:
                    return False
                return True

            def info(self, name: str, tree: bool, revision: str) -> None:
                found = hub.repos.get(name)
                if self.failed(found, "info", revision):
                    return
                assert found is not None
                commit = found.branches.get(revision, revision)
                files = found.commits[commit] | dict.fromkeys(found.unlisted, b"")
                siblings, entries = [], []
                for path, data in files.items():
                    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
                    sibling: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": blob_id(data)}
                    if path.endswith(LFS):
                        digest = hashlib.sha256(data).hexdigest()
                        sibling["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
                        entry |= {"lfs": {"oid": digest, "size": len(data), "pointerSize": 134}, "xetHash": digest}
                    siblings.append(sibling)
                    entries.append(entry)
                answer = entries if tree else {"id": name, "modelId": name, "sha": commit, "siblings": siblings}
                self.reply(200, json.dumps(answer).encode(), Content_Type="application/json")

            def resolve(self, name: str, revision: str, path: str) -> None:
                found = hub.repos.get(name)
                if self.failed(found, "resolve", revision):
                    return
                assert found is not None
                commit = found.branches.get(revision, revision)
                data = found.commits[commit].get(path)
                digest = hashlib.sha256(data or b"").hexdigest()
                if data is None:
                    self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
                elif path.endswith(LFS):
                    self.reply(
                        302,
                        Location=f"{hub.cdn}/{name}/{commit}/{path}?signature=abc",
                        X_Repo_Commit=commit,
                        X_Linked_Etag=f'"{digest}"',
                        X_Linked_Size=len(data),
                        ETag='"of-the-redirect"',
                        X_Xet_Hash=digest,
                        Link=f'<{hub.url}/api/models/{name}/xet-read-token/{commit}>; rel="xet-auth"',
                    )
                else:
                    self.reply(200, data, ETag=f'"{blob_id(data)}"', X_Repo_Commit=commit)

            def blob(self, path: str) -> None:
                _, org, name, commit, file = path.split("/", 4)
                found = hub.repos[f"{org}/{name}"]
                if self.failed(found, "cdn"):
                    return
                data = found.commits[commit][file]
                if found.garble == "content":
                    data = data[:-1] + bytes([data[-1] ^ 1])
                if found.garble == "size":
                    data += b"more"
                match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
                start = int(match[1]) if match else 0
                headers = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if match else {}
                rest = data[start:]
                how = found.cut.pop() if found.cut else None
                sent = rest[: len(rest) // 2] if how else rest
                self.reply(206 if match else 200, sent, Content_Length=len(rest), **headers)
                if how:
                    self.close_connection = True
                if how == "reset":
                    time.sleep(0.05)  # let what was sent be read first
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    os.close(self.connection.detach())

        return Handler


def due(fault: list[Any] | None) -> bool:
    """Whether this request is to fail; counts it."""
    if fault is None:
        return False
    if fault[3]:
        fault[3] -= 1
        return False
    fault[2] -= 1
    return bool(fault[2] >= 0)


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


WORKER = """
import json, sys
import torch
from handloom.checkpoint import open_checkpoint
for line in sys.stdin:
    try:
        checkpoint = open_checkpoint(**json.loads(line))
        sums = {}
        for name, info in list(checkpoint.tensors.items())[:20]:
            out = torch.empty(info.shape)
            checkpoint.read_into(name, out)
            sums[name] = out.sum().item()
        tokenizer = checkpoint.tokenizer()
        answer = {
            "name": checkpoint.name, "origin": checkpoint.origin, "path": str(checkpoint.path), "sums": sums,
            "ids": tokenizer and tokenizer.encode("Once upon"), "config": checkpoint.config,
        }
    except Exception as error:
        answer = {"error": type(error).__name__, "message": str(error), "cause": repr(error.__cause__)}
    print(json.dumps(answer), flush=True)
"""


class Client:
    """A process with the real client, and the cache folder it uses."""

    def __init__(self, home: Path, endpoint: str, stderr: Path, **variables: str) -> None:
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "HANDLOOM"))}
        environment = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "NO_PROXY": "*", "HF_HUB_DISABLE_XET": "1"}
        self.stderr = stderr
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr.open("w"),
            text=True,
            env=clean | environment | variables,
        )

    def __call__(self, source: str | None, **options: Any) -> dict[str, Any]:
        """`open_checkpoint(source, **options)` there: what it gave, or the error."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"source": source} | options) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.stderr.read_text()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self.process.terminate()
        self.process.communicate(timeout=30)
