"""A stand-in for the Hugging Face hub: the endpoints of an upload, on loopback."""

from __future__ import annotations

import base64
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

TOKEN = "a-token-that-the-server-takes"


class Hub(ThreadingHTTPServer):
    """Accepts ``TOKEN``; keeps what arrives in ``files`` by repository and path, and ``created`` repositories."""

    def __init__(self, token: str = TOKEN) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token = token
        self.objects: dict[str, bytes] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.created: list[dict] = []
        self.requests: list[str] = []

    @property
    def environment(self) -> dict[str, str]:
        """Environment of a process that takes this server for the hub."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running_hub(token: str = TOKEN):
    with Hub(token) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        pass

    def _reply(self, status, answer):
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_PUT(self):
        self.server.objects[self.path.rpartition("/")[2]] = self._body()
        self._reply(200, {})

    def do_POST(self):
        hub, body = self.server, self._body()
        hub.requests.append(self.path)
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._reply(401, {"error": "Invalid credentials in Authorization header"})
        elif self.path == "/api/repos/create":
            hub.created.append(asked := json.loads(body))
            name = f"{asked['organization'] or 'me'}/{asked['name']}"
            self._reply(200, {"url": f"{hub.url}/{name}", "name": name})
        elif self.path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---")[1])
            self._reply(200, {"warnings": [], "errors": []})
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/main", self.path):
            modes = [
                {"path": f["path"], "shouldIgnore": False, "uploadMode": "lfs" if _is_large(f["path"]) else "regular"}
                for f in json.loads(body)["files"]
            ]
            self._reply(200, {"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                o | {"actions": {"upload": {"href": f"{hub.url}/objects/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self._reply(200, {"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
            self._commit(match[1], body)
        else:
            self._reply(404, {"error": f"no {self.path}"})

    def _commit(self, repo, body):
        files = self.server.files.setdefault(repo, {})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        self._reply(200, {"commitUrl": f"{self.server.url}/{repo}/commit/abc", "commitOid": "abc"})


def _is_large(path):
    return path.endswith((".safetensors", ".png"))
