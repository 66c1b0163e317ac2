"""As much of the Hugging Face Hub as pushing a folder needs: repositories, git LFS, commits; in memory."""

from __future__ import annotations

import base64
import hashlib
import json
from http.server import ThreadingHTTPServer
from typing import Any

from tests.stand_ins.http import Handler, address

REPOSITORY = {"siblings": [], "tags": []}


class Hub(Handler):
    """files: by repository, what was committed; private: by repository; blobs: of LFS, by SHA-256. writers: whose token
    may write; is_down: whether every answer is 503.
    """

    files: dict[str, dict[str, bytes]]
    private: dict[str, bool]
    blobs: dict[str, bytes]
    writers: set[str]
    is_down: bool

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        self.server: ThreadingHTTPServer
        if self.is_down:
            return 503, {"error": "maintenance"}
        if path.startswith("/blob/"):
            if self.command == "PUT":
                self.blobs[path.removeprefix("/blob/")] = body
            return 200, {}
        if self.headers.get("authorization") not in {f"Bearer {token}" for token in self.writers}:
            return 401, {"error": "Invalid credentials"}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._upload(each) for each in json.loads(body)["objects"]]}
        if path.startswith("/api/models/"):
            owner, name, *what = path.removeprefix("/api/models/").split("/")
            return self._of_model(f"{owner}/{name}", what, body)
        return 404, {"error": f"no {path}"}

    def _create(self, wanted: dict) -> tuple[int, Any]:
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] == "others":
            return 403, {"error": "You don't have the rights to create a model under the namespace others"}
        if name in self.private:
            return 409, {"error": "You already created this model repo", "url": f"{address(self.server)}/{name}"}
        self.private[name] = wanted["visibility"] == "private"
        self.files[name] = {}
        return 200, {"url": f"{address(self.server)}/{name}"}

    def _upload(self, wanted: dict) -> dict:
        upload = {"href": f"{address(self.server)}/blob/{wanted['oid']}", "header": {}}
        return wanted | {"actions": {"upload": upload}}

    def _of_model(self, name: str, what: list[str], body: bytes) -> tuple[int, Any]:
        if name not in self.private:
            return 404, {"error": "Repository not found"}
        if not what:
            return 200, REPOSITORY | {"id": name, "private": self.private[name]}
        if what[0] == "preupload":
            modes = {True: "lfs", False: "regular"}
            files = [{"path": file["path"]} for file in json.loads(body)["files"]]
            files = [
                file | {"uploadMode": modes[file["path"].endswith(".safetensors")], "shouldIgnore": False}
                for file in files
            ]
            return 200, {"files": files}
        if what[0] == "commit":
            for line in map(json.loads, body.splitlines()):
                self._commit(name, line["key"], line["value"])
            url = f"{address(self.server)}/{name}/commit/1"
            return 200, {"success": True, "commitOid": "1" * 40, "commitUrl": url}
        return 404, {"error": f"no {what}"}

    def _commit(self, name: str, key: str, value: dict) -> None:
        if key == "file":
            self.files[name][value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            content = self.blobs[value["oid"]]
            assert hashlib.sha256(content).hexdigest() == value["oid"] and len(content) == value["size"]
            self.files[name][value["path"]] = content


def new_hub() -> type[Hub]:
    """Returns a Hub of its own, without repositories, to which the token `writer` may write."""
    return type("NewHub", (Hub,), {"files": {}, "private": {}, "blobs": {}, "writers": {"writer"}, "is_down": False})
