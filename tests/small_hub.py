"""A model hub on this machine: as much of its HTTP interface as pushing and loading a model asks.

It keeps each commit's files in memory, as bytes, and nothing else.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class SmallHub:
    """`with SmallHub() as hub:` serves at `hub.address`; `hub.files` is {repo: {path: bytes}}."""

    def __init__(self):
        self.files: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []  # "METHOD path" of every request
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                length = int(self.headers.get("Content-Length") or 0)
                path = unquote(urlsplit(self.path).path)
                hub.asked.append(f"{self.command} {path}")
                status, body, headers = hub.respond(path, self.rfile.read(length))
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"Content-Length": len(body), **headers}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_POST = do_HEAD = answer

            def log_message(self, *words):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def commit(self, repo: str) -> str:
        """Name of what a repository holds now."""
        return hashlib.sha1(repr(sorted(self.files[repo].items())).encode()).hexdigest()

    def respond(self, path: str, body: bytes):
        """(status, body, headers) of a request."""
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted.get('organization')}/{wanted['name']}"
            self.files.setdefault(repo, {})
            return 200, {"url": f"{self.address}/{repo}", "name": repo}, {}
        if "/resolve/" in path:
            repo, _, file = path[1:].partition("/resolve/")
            content = self.files.get(repo, {}).get(file.partition("/")[2])
            if content is None:
                return 404, b"", {"X-Error-Code": "EntryNotFound"}
            tag = hashlib.sha1(content).hexdigest()
            return 200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": self.commit(repo)}
        if path.startswith("/api/models/"):
            owner, name, what = [*path.split("/")[3:], "", ""][:3]
            return self.of_repository(f"{owner}/{name}", what, body)
        return 404, b"", {}

    def of_repository(self, repo: str, what: str, body: bytes):
        if repo not in self.files:
            return 404, b"", {"X-Error-Code": "RepoNotFound"}
        files = self.files[repo]
        if what == "preupload":
            asked = [file["path"] for file in json.loads(body)["files"]]
            kind = {"uploadMode": "regular", "shouldIgnore": False}
            return 200, {"files": [{"path": path, **kind} for path in asked]}, {}
        if what == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = self.commit(repo)
            url = f"{self.address}/{repo}/commit/{commit}"
            return 200, {"commitUrl": url, "commitOid": commit}, {}
        if what == "tree":
            return 200, [_entry(path, content) for path, content in files.items()], {}
        siblings = [{"rfilename": path} for path in files]
        return 200, {"id": repo, "sha": self.commit(repo), "siblings": siblings, "tags": []}, {}


def _entry(path: str, content: bytes) -> dict:
    oid = hashlib.sha1(content).hexdigest()
    return {"type": "file", "path": path, "size": len(content), "oid": oid}
