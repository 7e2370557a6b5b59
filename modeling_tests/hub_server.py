"""A Hub for tests, on the loopback interface: the documented HTTP API, as much of it as publishing and loading use.

Repositories, branches and single commits are kept in memory. `faults` makes chosen requests fail, and `requests` lists
what was asked. Transfer is by git LFS; the Hub's newer one (Xet) is not imitated.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_a_token_that_may_write"


@dataclass
class Repository:
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})

    def find(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files of a branch name or a commit."""
        for name, files in self.branches.items():
            if revision in (name, commit_of(files)):
                return commit_of(files), files
        return None


def commit_of(files: dict[str, bytes]) -> str:
    """A commit hash that depends on what is in the commit."""
    return hashlib.sha1(repr(sorted((name, oid_of(content)) for name, content in files.items())).encode()).hexdigest()


def oid_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Fault:
    """What happens to the next `times` requests whose method and path match: a status, or a broken connection."""

    pattern: str
    status: int | None = None
    message: str = ""
    times: int = 1


class HubServer(ThreadingHTTPServer):
    """Serves until `close`. `url` is what HF_ENDPOINT has to be."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        """A client that goes away is no news."""


class HubRequest(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args) -> None:
        """Silence: pytest shows what matters."""

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, content: bytes | dict | list, status: int = 200, **headers: str) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers.setdefault("Content-Type", "application/json")
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        headers = {"X_Error_Code": code} if code else {}
        self.answer({"error": message or code}, status, **headers)

    def do_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        line = f"{self.command} {path}"
        self.server.requests.append(line)
        for fault in self.server.faults:
            if fault.times and re.search(fault.pattern, line):
                fault.times -= 1
                if fault.status is None:
                    if int(self.headers.get("Content-Length") or 0):
                        self.rfile.read1(64)  # breaks in the middle of what is being sent
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return None
                self.body()
                return self.refuse(fault.status, message=fault.message)
        for pattern, handler in ROUTES:
            match = re.fullmatch(pattern, line)
            if match:
                writes = self.command in ("POST", "PUT", "DELETE") and "validate-yaml" not in path
                if writes and not path.startswith("/lfs/") and not self.is_known():
                    self.body()
                    return self.refuse(401, message="Invalid username or password.")
                return handler(self, *match.groups())
        self.body()
        return self.refuse(404, "EntryNotFound", f"no route for {line}")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_any

    def is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def find(self, repo: str, revision: str = "main") -> tuple[str, dict[str, bytes]] | None:
        """Commit and files, or None when the request has been answered with what is missing."""
        repository = self.server.repositories.get(repo)
        if repository is None or (repository.private and not self.is_known()):
            self.refuse(401 if not self.is_known() else 404, "RepoNotFound", "Repository not found")
            return None
        found = repository.find(revision)
        if found is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    # Repositories

    def create(self) -> None:
        asked = json.loads(self.body())
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if repo in self.server.repositories:
            return self.refuse(409, message="You already created this model repo")
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.server.repositories[repo] = Repository(private)
        return self.answer({"url": f"{self.server.url}/{repo}", "name": repo, "id": repo})

    def delete(self) -> None:
        asked = json.loads(self.body())
        self.server.repositories.pop(f"{asked['organization']}/{asked['name']}")
        self.answer({})

    def create_branch(self, repo: str, branch: str) -> None:
        self.body()
        branches = self.server.repositories[repo].branches
        branches[branch] = dict(branches["main"])
        self.answer({})

    def delete_branch(self, repo: str, branch: str) -> None:
        self.body()
        del self.server.repositories[repo].branches[branch]
        self.answer({})

    def refs(self, repo: str) -> None:
        if self.find(repo):
            branches = self.server.repositories[repo].branches
            listed = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit_of(files)}
                for name, files in branches.items()
            ]
            self.answer({"branches": listed, "converts": [], "tags": []})

    def info(self, repo: str, revision: str | None = None) -> None:
        if found := self.find(repo, revision or "main"):
            commit, files = found
            siblings = [{"rfilename": name} for name in sorted(files)]
            self.answer(
                {"id": repo, "modelId": repo, "sha": commit, "tags": [], "siblings": siblings, "private": False}
            )

    def tree(self, repo: str, revision: str, folder: str | None = None) -> None:
        if found := self.find(repo, revision):
            if folder:
                return self.refuse(404, "EntryNotFound", f"no folder {folder}")
            self.answer(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": oid_of(content)}
                    for name, content in sorted(found[1].items())
                ]
            )
        return None

    # Uploads

    def validate_yaml(self) -> None:
        content = json.loads(self.body())["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        metadata = yaml.safe_load(match[1]) if match else None
        if not isinstance(metadata, dict) or "license" not in metadata:
            return self.answer({"errors": [{"message": '"license" is required'}], "warnings": []}, 400)
        return self.answer({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        asked = json.loads(self.body())
        if found := self.find(repo, revision):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": oid_of(found[1][file["path"]]) if file["path"] in found[1] else None,
                }
                for file in asked["files"]
            ]
            self.answer({"files": files})

    def lfs_batch(self, repo: str) -> None:
        objects = []
        for asked in json.loads(self.body())["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.server.blobs:  # without actions: it is there already
                entry["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{asked['oid']}", "header": {}}}
            objects.append(entry)
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        content = self.body()
        if oid_of(content) != oid:
            return self.refuse(400, message="the content is not what its hash says")
        self.server.blobs[oid] = content
        return self.answer({})

    def commit(self, repo: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines()]
        if not (found := self.find(repo, revision)):
            return
        files = dict(found[1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
        self.server.repositories[repo].branches[revision] = files
        commit = commit_of(files)
        self.answer({"commitUrl": f"{self.server.url}/{repo}/commit/{commit}", "commitOid": commit, "success": True})

    # Downloads

    def resolve(self, repo: str, revision: str, name: str) -> None:
        if found := self.find(repo, revision):
            commit, files = found
            if name not in files:
                return self.answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            content = files[name]
            self.answer(content, ETag=f'"{oid_of(content)}"', X_Repo_Commit=commit)
        return None


REPO, REVISION = r"([\w.-]+/[\w.-]+)", r"([\w./-]+?)"
ROUTES = [
    (r"POST /api/repos/create", HubRequest.create),
    (r"DELETE /api/repos/delete", HubRequest.delete),
    (r"POST /api/validate-yaml", HubRequest.validate_yaml),
    (rf"POST /api/models/{REPO}/branch/{REVISION}", HubRequest.create_branch),
    (rf"DELETE /api/models/{REPO}/branch/{REVISION}", HubRequest.delete_branch),
    (rf"POST /api/models/{REPO}/preupload/{REVISION}", HubRequest.preupload),
    (rf"POST /api/models/{REPO}/commit/{REVISION}", HubRequest.commit),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", HubRequest.lfs_batch),
    (r"PUT /lfs/(\w+)", HubRequest.lfs_put),
    (rf"GET /api/models/{REPO}/refs", HubRequest.refs),
    (rf"GET /api/models/{REPO}", HubRequest.info),
    (rf"GET /api/models/{REPO}/revision/{REVISION}", HubRequest.info),
    (rf"GET /api/models/{REPO}/tree/([\w-]+)/?(.*)", HubRequest.tree),
    (rf"(?:HEAD|GET) /{REPO}/resolve/([\w.-]+)/(.+)", HubRequest.resolve),
]
