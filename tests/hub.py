"""A model hub on loopback that the real `huggingface_hub` client talks to over HTTP. Standard library only.

A small real server, not a mock: it keeps commits, blobs and LFS objects, checks sizes, sha256 and bearer tokens, and
answers with the status codes, error headers and redirects of the real hub. LFS objects live on another host name
(localhost instead of 127.0.0.1), as the real hub's do: the token must not reach it. `fail` injects faults; `requests`
holds every request with its body. Xet is not spoken.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LARGE = (".safetensors", ".png")
ENDPOINTS = {  # name -> method and path of each request that publishing makes
    "whoami": ("GET", r"/api/whoami-v2"),
    "create": ("POST", r"/api/repos/create"),
    "info": ("GET", r"/api/models/[^/]+/[^/]+(/revision/[^/]+)?"),
    "yaml": ("POST", r"/api/validate-yaml"),
    "preupload": ("POST", r"/api/models/[^/]+/[^/]+/preupload/[^/]+"),
    "batch": ("POST", r"/[^/]+/[^/]+\.git/info/lfs/objects/batch"),
    "put": ("PUT", r"/_lfs/[0-9a-f]{64}"),
    "part": ("PUT", r"/_lfs/[0-9a-f]{64}/part/\d+"),
    "complete": ("POST", r"/_lfs/[0-9a-f]{64}/complete"),
    "verify": ("POST", r"/_lfs/[0-9a-f]{64}/verify"),
    "commit": ("POST", r"/api/models/[^/]+/[^/]+/commit/[^/]+"),
    "tree": ("GET", r"/api/models/[^/]+/[^/]+/tree/[^/]+"),
    "head": ("HEAD", r"/[^/]+/[^/]+/resolve/[^/]+/.+"),
    "get": ("GET", r"/[^/]+/[^/]+/resolve/[^/]+/.+"),
    "object": ("GET", r"/_lfs/[0-9a-f]{64}"),
}


@dataclass
class Request:
    endpoint: str
    host: str
    path: str
    token: str | None
    headers: str
    body: bytes = b""


@dataclass
class Fault:
    endpoint: str
    status: int | None = None  # answered instead of the real answer
    cut: bool = False  # the connection is closed after half of the answer, or none
    corrupt: bool = False  # one byte of the answer's body is another
    delay: float = 0.0  # seconds before the answer
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1


class Refusal(Exception):
    def __init__(self, status: int, code: str = "", message: str = "refused") -> None:
        self.status, self.code, self.message = status, code, message


class Hub:
    """`with Hub(folder) as hub:`, then HF_ENDPOINT=hub.endpoint and one of `tokens`: {token: (user, role)}."""

    def __init__(self, root: Path, chunk: int | None = None) -> None:
        self.root, self.chunk = root, chunk
        root.mkdir(parents=True, exist_ok=True)
        self.tokens = {"hf_test_write": ("tester", "write"), "hf_test_read": ("tester", "read")}
        self.repos: dict[str, dict[str, Any]] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.parts: dict[tuple[str, int], bytes] = {}
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        port = self.server.server_address[1]
        self.endpoint, self.storage = f"http://127.0.0.1:{port}", f"http://localhost:{port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fail(self, endpoint: str, **fault: Any) -> None:
        assert endpoint in ENDPOINTS
        self.faults.append(Fault(endpoint, **fault))

    def tree(self, name: str, revision: str = "main") -> dict[str, str]:
        """{path: sha256} of what a branch holds."""
        repo = self.repos[name]
        return repo["commits"][repo["main"] if revision == "main" else revision]

    def commits(self, name: str) -> int:
        return len(self.repos[name]["commits"])

    def blob(self, sha256: str) -> Path:
        return self.root / sha256

    def store(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        fresh = self.root / f"{sha256}.{threading.get_ident()}"
        fresh.write_bytes(data)
        fresh.replace(self.blob(sha256))
        return sha256

    def create(self, name: str, private: bool) -> None:
        with self.lock:
            tree = {".gitattributes": self.store(b"*.safetensors filter=lfs\n")}
            first = hashlib.sha1(name.encode()).hexdigest()
            self.repos[name] = {"private": private, "main": first, "commits": {first: tree}}

    def repo(self, name: str, user: str | None) -> dict[str, Any]:
        found = self.repos.get(name)
        if found is None or (found["private"] and user is None):
            raise Refusal(404 if user else 401, "RepoNotFound", "Repository not found")
        return found

    def commit(self, name: str, lines: list[dict[str, Any]]) -> str:
        with self.lock:
            repo = self.repos[name]
            tree = dict(repo["commits"][repo["main"]])
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    tree[value["path"]] = self.store(base64.b64decode(value["content"], validate=True))
                elif line["key"] == "lfsFile":
                    if not self.blob(value["oid"]).exists():
                        raise Refusal(400, message="LFS pointer points to a file that does not exist")
                    tree[value["path"]] = value["oid"]
                elif line["key"] == "deletedFile":
                    del tree[value["path"]]
            number = hashlib.sha1(f"{repo['main']} {sorted(tree.items())}".encode()).hexdigest()
            repo["commits"][number] = tree
            repo["main"] = number
            return number


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        at = urllib.parse.urlsplit(self.path)
        endpoint = next(
            (n for n, (m, p) in ENDPOINTS.items() if m == self.command and re.fullmatch(p, at.path)), "?"
        )
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip() or None
        asked = Request(endpoint, self.headers["Host"], self.path, token, str(self.headers))
        self.hub.requests.append(asked)
        asked.body = b"".join(self.body())
        self.fault = next((f for f in self.hub.faults if f.endpoint == endpoint and f.times > 0), None)
        try:
            if self.fault:
                self.fault.times -= 1
                time.sleep(self.fault.delay)
                if self.fault.status:
                    raise Refusal(self.fault.status, message="injected")
            self.token, self.user = token, self.identify(token)
            parts = [urllib.parse.unquote(part) for part in at.path.strip("/").split("/")]
            getattr(self, f"do_{endpoint}", self.unknown)(parts, asked.body)
        except Refusal as no:
            codes = {"X-Error-Code": no.code, "X-Error-Message": no.message} if no.code else {}
            self.reply(no.status, {"error": no.message}, codes | (self.fault.headers if self.fault else {}))

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def body(self) -> Iterator[bytes]:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            yield self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def identify(self, token: str | None) -> str | None:
        if token is not None and token not in self.hub.tokens:
            raise Refusal(401, message="Invalid credentials in Authorization header")
        return self.hub.tokens[token][0] if token else None

    def writer(self) -> None:
        if not self.token or self.hub.tokens[self.token][1] != "write":
            raise Refusal(403 if self.user else 401, message="Forbidden: you must use a write token")

    def reply(
        self, status: int, content: Any = None, headers: dict[str, str] | None = None, data: bytes = b""
    ) -> None:
        """JSON, or `data`."""
        kind = "application/octet-stream" if content is None else "application/json"
        data = data if content is None else json.dumps(content).encode()
        size = len(data)
        if self.fault and self.fault.corrupt and data:
            data = bytes([data[0] ^ 1]) + data[1:]
            self.fault = None
        cut = self.fault is not None and self.fault.cut
        if cut and (self.command == "HEAD" or size < 64):
            self.close_connection = True
            return
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": str(size), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: size // 2] if cut else data)
        self.close_connection = self.close_connection or cut

    def unknown(self, parts: list[str], body: bytes) -> None:
        raise Refusal(404, message=f"no route {self.command} {self.path}")

    # --- the API -----------------------------------------------------------------------------------------------

    def do_whoami(self, parts: list[str], body: bytes) -> None:
        if self.user is None:
            raise Refusal(401, message="Invalid username or password.")
        self.reply(200, {"type": "user", "name": self.user, "orgs": [], "auth": {"accessToken": {}}})

    def do_yaml(self, parts: list[str], body: bytes) -> None:
        text = json.loads(body)["content"]
        header = re.match(r"---\n(.*?)\n---", text, re.S)
        sound = header and re.search(r"^license: \S+$", header[1], re.M)
        errors = [] if sound else [{"message": "the card has no license"}]
        self.reply(400 if errors else 200, {"errors": errors, "warnings": []})

    def do_create(self, parts: list[str], body: bytes) -> None:
        self.writer()
        asked = json.loads(body)
        name = f"{asked.get('organization') or self.user}/{asked['name']}"
        if name.split("/")[0] != self.user:
            raise Refusal(403, message="You don't have the rights to create a model under this namespace")
        address = {"url": f"{self.hub.endpoint}/{name}", "name": name}
        if name in self.hub.repos:
            return self.reply(409, {"error": "You already created this model repo"} | address)
        self.hub.create(name, asked.get("visibility") == "private" or bool(asked.get("private")))
        return self.reply(200, address)

    def do_info(self, parts: list[str], body: bytes) -> None:
        name = "/".join(parts[2:4])
        repo = self.hub.repo(name, self.user)
        number = repo["main"] if len(parts) < 6 or parts[5] == "main" else parts[5]
        siblings = [{"rfilename": path} for path in sorted(repo["commits"][number])]
        about = {"id": name, "modelId": name, "sha": number, "private": repo["private"], "tags": []}
        self.reply(200, about | {"siblings": siblings, "downloads": 0, "likes": 0})

    def do_tree(self, parts: list[str], body: bytes) -> None:
        repo = self.hub.repo("/".join(parts[2:4]), self.user)
        tree = repo["commits"][repo["main"] if parts[5] == "main" else parts[5]]
        entries = []
        for path, sha256 in sorted(tree.items()):
            size = self.hub.blob(sha256).stat().st_size
            entry = {"type": "file", "path": path, "size": size, "oid": sha256[:40]}
            large = {"lfs": {"oid": sha256, "size": size, "pointerSize": 134}} if path.endswith(LARGE) else {}
            entries.append(entry | large)
        self.reply(200, entries)

    def do_preupload(self, parts: list[str], body: bytes) -> None:
        self.writer()
        tree = self.hub.tree("/".join(parts[2:4]))
        files = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(LARGE)
            sha256 = tree.get(file["path"])
            oid = None
            if sha256:
                data = self.hub.blob(sha256).read_bytes()
                oid = sha256 if large else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply(200, {"files": files})

    def do_commit(self, parts: list[str], body: bytes) -> None:
        self.writer()
        name = "/".join(parts[2:4])
        number = self.hub.commit(name, [json.loads(line) for line in body.splitlines() if line])
        url = f"{self.hub.endpoint}/{name}/commit/{number}"
        self.reply(200, {"success": True, "commitOid": number, "commitUrl": url, "pullRequestUrl": None})

    # --- large files -------------------------------------------------------------------------------------------

    def do_batch(self, parts: list[str], body: bytes) -> None:
        self.writer()
        asked, objects = json.loads(body), []
        for entry in asked["objects"]:
            oid, size = entry["oid"], entry["size"]
            href = f"{self.hub.storage}/_lfs/{oid}"
            upload: dict[str, Any] = {"href": href, "header": {}}
            if self.hub.chunk and size > self.hub.chunk and "multipart" in asked["transfers"]:
                count = -(-size // self.hub.chunk)
                urls = {str(i): f"{href}/part/{i}" for i in range(1, count + 1)}
                upload = {
                    "href": f"{self.hub.endpoint}/_lfs/{oid}/complete",
                    "header": {"chunk_size": str(self.hub.chunk)} | urls,
                }
            verify = {"href": f"{self.hub.endpoint}/_lfs/{oid}/verify", "header": {}}
            there = self.hub.blob(oid).exists()
            actions = {} if there else {"actions": {"upload": upload, "verify": verify}}
            objects.append({"oid": oid, "size": size} | actions)
        self.reply(200, {"transfer": "basic", "objects": objects})

    def do_put(self, parts: list[str], body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != parts[1]:
            raise Refusal(400, message="sha256 mismatch")
        self.hub.store(body)
        self.reply(200)

    def do_part(self, parts: list[str], body: bytes) -> None:
        self.hub.parts[parts[1], int(parts[3])] = body
        self.reply(200, headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    def do_complete(self, parts: list[str], body: bytes) -> None:
        numbers = sorted(part["partNumber"] for part in json.loads(body)["parts"])
        self.do_put(parts, b"".join(self.hub.parts[parts[1], number] for number in numbers))

    def do_verify(self, parts: list[str], body: bytes) -> None:
        self.writer()
        blob = self.hub.blob(parts[1])
        if not (blob.exists() and blob.stat().st_size == json.loads(body)["size"]):
            raise Refusal(404, message="object missing or of the wrong size")
        self.reply(200, {})

    # --- downloads ---------------------------------------------------------------------------------------------

    def do_head(self, parts: list[str], body: bytes) -> None:
        repo = self.hub.repo("/".join(parts[:2]), self.user)
        number, path = repo["main"] if parts[3] == "main" else parts[3], "/".join(parts[4:])
        common = {"X-Repo-Commit": number, "Accept-Ranges": "bytes"}
        sha256 = repo["commits"].get(number, {}).get(path)
        if sha256 is None:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        if path.endswith(LARGE):
            size = str(self.hub.blob(sha256).stat().st_size)
            there = {"X-Linked-Size": size, "X-Linked-ETag": f'"{sha256}"', "ETag": f'"{sha256}"'}
            self.reply(302, headers=common | there | {"Location": f"{self.hub.storage}/_lfs/{sha256}"})
        else:
            self.serve(sha256, common)

    do_get = do_head

    def do_object(self, parts: list[str], body: bytes) -> None:
        self.serve(parts[1], {"Accept-Ranges": "bytes"})

    def serve(self, sha256: str, headers: dict[str, str]) -> None:
        data = self.hub.blob(sha256).read_bytes()
        headers = {"ETag": f'"{sha256}"', **headers}
        ranged = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if ranged and int(ranged[1]):
            first = int(ranged[1])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            return self.reply(206, headers=headers, data=data[first:])
        return self.reply(200, headers=headers, data=data)
