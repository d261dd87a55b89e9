"""A Hugging Face Hub in a few lines, on the loopback address, for the real client to talk to.

It knows repositories of models with one branch, files sent inside a commit, and large files sent
through Git LFS's basic transfer. Everything lies in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

#: Files of these kinds, and larger ones, go through LFS as on the true Hub.
LFS_SUFFIXES = (".zip", ".mp4", ".pkl", ".npz")
LFS_SIZE = 1_000_000


class Repository:
    """Files of one model and how they came."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.by_lfs: set[str] = set()
        self.commits = [hashlib.sha1(b"empty").hexdigest()]


class HubServer:
    """The server; use it as a context manager.

    :ivar repositories: `owner/name` -> its files
    :ivar uploads: LFS object id -> content, as sent
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            self._repo_info(found.group(1))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+.*", path):
            self._tree(found.group(1))
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._file(found.group(1), found.group(2))
        else:
            self._json({"error": f"GET {path}: not known here"}, 404)

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        if path == "/api/repos/create":
            content = json.loads(body)
            name = f"{content.get('organization') or 'user'}/{content['name']}"
            exists = name in self.hub.repositories
            self.hub.repositories.setdefault(name, Repository())
            self._json({"url": f"{self.hub.url}/{name}", "id": name}, 409 if exists else 200)
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/[^/]+", path):
            self._preupload(json.loads(body))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/[^/]+", path):
            self._commit(found.group(1), body)
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._lfs_batch(json.loads(body))
        else:
            self._json({"error": f"POST {path}: not known here"}, 404)

    def do_PUT(self) -> None:
        content = self._body()
        oid = self.path.rpartition("/")[2]
        if hashlib.sha256(content).hexdigest() != oid:
            self._json({"error": "content and object id differ"}, 400)
            return
        self.hub.uploads[oid] = content
        self._json({})

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _json(self, content: object, status: int = 200, error: str = "") -> None:
        self._bytes(json.dumps(content).encode(), status, {"X-Error-Code": error} if error else {})

    def _bytes(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _repository(self, name: str) -> Repository | None:
        if name not in self.hub.repositories:
            self._json({"error": "Repository not found"}, 404, "RepoNotFound")
        return self.hub.repositories.get(name)

    def _repo_info(self, name: str) -> None:
        if (repository := self._repository(name)) is not None:
            siblings = [{"rfilename": file} for file in repository.files]
            sha = repository.commits[-1]
            self._json({"id": name, "modelId": name, "sha": sha, "siblings": siblings, "tags": []})

    def _tree(self, name: str) -> None:
        if (repository := self._repository(name)) is not None:
            self._json(
                [
                    {
                        "type": "file",
                        "path": file,
                        "size": len(content),
                        "oid": hashlib.sha1(content).hexdigest(),
                    }
                    for file, content in repository.files.items()
                ]
            )

    def _file(self, name: str, file: str) -> None:
        if (repository := self._repository(name)) is None:
            return
        if file not in repository.files:
            self._json({"error": "Entry not found"}, 404, "EntryNotFound")
            return
        content = repository.files[file]
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": repository.commits[-1],
        }
        self._bytes(content, 200, headers)

    def _preupload(self, content: dict) -> None:
        def mode(file: dict) -> str:
            large = file["size"] > LFS_SIZE or file["path"].endswith(LFS_SUFFIXES)
            return "lfs" if large else "regular"

        self._json(
            {
                "files": [
                    {"path": file["path"], "uploadMode": mode(file), "shouldIgnore": False}
                    for file in content["files"]
                ]
            }
        )

    def _lfs_batch(self, content: dict) -> None:
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}}
            for item in content["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, body: bytes) -> None:
        if (repository := self._repository(name)) is None:
            return
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.uploads[value["oid"]]
                repository.by_lfs.add(value["path"])
            elif entry["key"] != "header":
                self._json({"error": f"{entry['key']}: not known here"}, 400)
                return
        sha = hashlib.sha1(repository.commits[-1].encode() + body).hexdigest()
        repository.commits.append(sha)
        url = f"{self.hub.url}/{name}/commit/{sha}"
        self._json({"success": True, "commitOid": sha, "commitUrl": url})
