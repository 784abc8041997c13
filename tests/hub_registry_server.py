"""A loopback emulator of the Hugging Face Hub that takes uploads: repositories, commits, tags, LFS, ranges."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from ruamel.yaml import YAML

# Of the lists of licences (hub-docs, docs/hub/repositories-licenses.md) and of libraries (huggingface.js,
# packages/tasks/src/model-libraries.ts), those that models of this architecture have.
HUB_LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-sa-4.0", "cc0-1.0", "bsd-3-clause", "gemma")
HUB_LIBRARIES = ("transformers", "mlx", "peft", "keras", "diffusers", "sentence-transformers")
LFS_FROM = 1000  # bytes; smaller files are kept in git


class HubRegistryServer:
    """Repositories by name, each a list of commits (sha, files by path) and tags; `lfs` holds contents by SHA-256.

    `private` has the names of private repositories. `log` has method and path of every request; `fail` maps a part of a
    path to a status to answer with instead. Without `ranges` files are always sent whole. With the variables
    `environment` a program takes this server for the Hub.
    """

    def __init__(self):
        self.repositories, self.lfs, self.log, self.fail = {}, {}, [], {}
        self.private, self.ranges = set(), True
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.environment = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_secret"}

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def create(self, repo):
        if repo in self.repositories:
            return False
        self.repositories[repo] = {"commits": [], "tags": {}}
        self.commit(repo, {".gitattributes": b""})
        return True

    def commit(self, repo, files):
        commits = self.repositories[repo]["commits"]
        sha = hashlib.sha1(f"{repo} {len(commits)}".encode()).hexdigest()
        commits.append((sha, files))
        return sha

    def revision(self, repo, name):
        """Return (sha, files) of a branch, tag or commit, or None."""
        commits = self.repositories[repo]["commits"]
        sha = commits[-1][0] if name == "main" else self.repositories[repo]["tags"].get(name, name)
        return next((commit for commit in commits if commit[0] == sha), None)


def metadata_errors(card):
    """Yield what the Hub refuses, or what it would not understand, in the metadata of a model card.

    Rules: https://github.com/huggingface/hub-docs/blob/main/modelcard.md, and the pages on licences and model cards.
    """
    metadata = YAML(typ="safe").load(card.split("---\n")[1])
    if metadata.get("license") not in (*HUB_LICENSES, "other"):
        yield f"license {metadata.get('license')} is not in the Hub's list"
    if metadata.get("license") == "other" and not re.fullmatch(r"[a-z0-9.-]+", metadata.get("license_name", "")):
        yield "another license needs license_name"
    if metadata.get("license_link", "LICENSE") not in ("LICENSE", "LICENSE.md"):
        yield "license_link names no file of the repository"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", metadata.get("base_model", "a/b")):
        yield "base_model is no name of a repository"
    if metadata.get("base_model_relation", "quantized") not in ("adapter", "finetune", "merge", "quantized"):
        yield "base_model_relation is unknown"
    if metadata.get("library_name", "transformers") not in HUB_LIBRARIES:
        yield f"the Hub knows no library {metadata['library_name']}"
    if metadata.get("pipeline_tag") != "text-generation":
        yield "pipeline_tag is unknown"
    if not all(re.fullmatch(r"[\w .-]+", tag) for tag in metadata.get("tags", [])):
        yield "a tag has other characters than letters"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms for the client to acknowledge the headers

    def log_message(self, *_):
        """Print nothing."""

    def _answer(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))} | headers
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, code):
        self._answer(404, {"error": code}, X_Error_Code=code)

    def _handle(self):
        with self.server.hub.lock:  # one at a time, as the Hub's commits are
            self._respond()

    def _respond(self):
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.log.append((self.command, path))
        for part, status in hub.fail.items():
            if part in path:
                return self._answer(status, {"error": "the emulator was told to fail"})
        if path == "/api/repos/create":
            request = json.loads(body)
            repo = f"{request['organization']}/{request['name']}" if request.get("organization") else request["name"]
            created = hub.create(repo)
            if created and request.get("visibility") == "private":
                hub.private.add(repo)
            return self._answer(200 if created else 409, {"url": f"{hub.url}/{repo}"})
        if path == "/api/validate-yaml":
            errors = [{"message": error} for error in metadata_errors(json.loads(body)["content"])]
            return self._answer(400 if errors else 200, {"errors": errors, "warnings": []})
        if path.startswith("/lfs/"):
            hub.lfs[path.removeprefix("/lfs/")] = body
            return self._answer(200, {})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w[\w-]*)(?:/(.+))?", path):
            repo, verb, revision = match.groups()
            if repo not in hub.repositories:
                return self._missing("RepoNotFound")
            return getattr(self, "_" + verb.replace("-", "_"))(repo, revision, body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(body))
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(*match.groups())
        return self._answer(404, {"error": path})

    do_GET = do_POST = do_PUT = do_HEAD = _handle

    def _preupload(self, repo, revision, body):
        files = json.loads(body)["files"]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] >= LFS_FROM else "regular",
                "shouldIgnore": False,
            }
            for file in files
        ]
        self._answer(200, {"files": modes})

    def _batch(self, request):
        hub, objects = self.server.hub, []
        for item in request["objects"]:
            actions = {} if item["oid"] in hub.lfs else {"upload": {"href": f"{hub.url}/lfs/{item['oid']}"}}
            objects.append(item | ({"actions": actions} if actions else {}))
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, repo, revision, body):
        hub = self.server.hub
        head, files = hub.revision(repo, "main")
        files = dict(files)
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header" and value.get("parentCommit", head) != head:
                return self._answer(412, {"error": "the parent is not the head"})
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = hub.lfs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        sha = hub.commit(repo, files)
        return self._answer(200, {"commitUrl": f"{hub.url}/{repo}/commit/{sha}", "commitOid": sha, "success": True})

    def _tag(self, repo, revision, body):
        tags, tag = self.server.hub.repositories[repo]["tags"], json.loads(body)["tag"]
        if tag in tags:
            return self._answer(409, {"error": "the tag exists"})
        tags[tag] = self.server.hub.revision(repo, revision)[0]
        return self._answer(200, {})

    def _refs(self, repo, revision, body):
        tags = self.server.hub.repositories[repo]["tags"].items()
        head = self.server.hub.revision(repo, "main")[0]
        self._answer(
            200,
            {
                "branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": head}],
                "tags": [{"name": name, "ref": f"refs/tags/{name}", "targetCommit": sha} for name, sha in tags],
                "converts": [],
            },
        )

    def _revision(self, repo, revision, body):
        found = self.server.hub.revision(repo, revision)
        if found is None:
            return self._missing("RevisionNotFound")
        siblings = [{"rfilename": path} for path in found[1]]
        return self._answer(200, {"_id": "0", "id": repo, "modelId": repo, "sha": found[0], "siblings": siblings})

    def _tree(self, repo, revision, body):
        found = self.server.hub.revision(repo, revision.split("/")[0])
        if found is None:
            return self._missing("RevisionNotFound")
        files = found[1].items()
        return self._answer(200, [{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in files])

    def _paths_info(self, repo, revision, body):
        from urllib.parse import parse_qs

        found = self.server.hub.revision(repo, revision)
        if found is None:
            return self._missing("RevisionNotFound")
        wanted = parse_qs(body.decode()).get("paths") or json.loads(body)["paths"]
        entries = [
            {"type": "file", "path": path, "size": len(found[1][path]), "oid": "0" * 40}
            for path in wanted
            if path in found[1]
        ]
        return self._answer(200, entries)

    def _resolve(self, repo, revision, path):
        hub = self.server.hub
        if repo not in hub.repositories:
            return self._missing("RepoNotFound")
        found = hub.revision(repo, revision)
        if found is None:
            return self._missing("RevisionNotFound")
        sha, files = found
        if path not in files:
            return self._missing("EntryNotFound")
        content = files[path]
        headers = {"X_Repo_Commit": sha, "ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept_Ranges": "bytes"}
        if hub.ranges and (span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            start, end = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
            headers["Content_Range"] = f"bytes {start}-{end}/{len(content)}"
            return self._answer(206, content[start : end + 1], **headers)
        return self._answer(200, content, **headers)
