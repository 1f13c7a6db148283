# SPDX-License-Identifier: Apache-2.0
"""A model hub on loopback, as far as huggingface_hub needs one to upload a folder and to download it again."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    """Keeps repositories in `server.files`: id -> {path: bytes}."""

    def log_message(self, *_):
        pass

    def answer(self, body=b"", status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        files = self.server.files
        if self.path == "/api/repos/create":
            given = json.loads(body)
            name = "/".join(filter(None, (given.get("organization"), given["name"])))
            files.setdefault(name, {})
            self.answer({"url": f"{self.server.url}/{name}", "name": name})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            wanted = [each["path"] for each in json.loads(body)["files"]]
            self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in wanted]})
        elif found := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    files[found[1]][value["path"]] = base64.b64decode(value["content"])
            url = f"{self.server.url}/{found[1]}/commit/{self.commit(found[1])}"
            self.answer({"success": True, "commitOid": self.commit(found[1]), "commitUrl": url})
        else:
            self.answer({"error": self.path}, 404)

    def do_GET(self):
        if found := re.fullmatch(r"/api/models/([^?]+?)(/revision/\w+|/tree/.*)?(\?.*)?", self.path):
            files = self.server.files.get(found[1], {})
            if files and (found[2] or "").startswith("/tree"):
                self.answer([{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in files.items()])
                return
            if files:
                names = [{"rfilename": name} for name in files]
                self.answer({"id": found[1], "sha": self.commit(found[1]), "siblings": names, "private": False})
                return
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/\w+/(.+)", self.path):
            content = self.server.files.get(found[1], {}).get(found[2])
            if content is not None:
                tag = hashlib.sha256(content).hexdigest()
                self.answer(content, ETag=f'"{tag}"', X_Repo_Commit=self.commit(found[1]))
                return
        code = "EntryNotFound" if "/resolve/" in self.path else "RepoNotFound"
        self.answer({"error": code}, 404, X_Error_Code=code)

    do_HEAD = do_GET

    def commit(self, name):
        return hashlib.sha1(repr(sorted(self.server.files[name])).encode()).hexdigest()


@contextmanager
def fake_hub():
    """Yield a server with `url` and `files`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.url = {}, f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
