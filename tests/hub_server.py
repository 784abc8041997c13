"""A loopback emulator of the Hugging Face Hub: one repository at one commit, a log of requests, faults on demand."""

import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, NamedTuple, cast
from urllib.parse import quote, unquote, urlsplit

LFS = (".safetensors", ".bin", ".pth", ".onnx")


class Request(NamedTuple):
    method: str
    path: str
    range: str | None = None


class HubServer:
    """Serve `files` as the repository `repo` at `commit`, which `branch` points to, while the context is open.

    Names that end in one of `lfs` are LFS files: as on the real Hub they are redirected to another host.
    A test sets the attributes below to make the server fail, and reads `log`.
    """

    def __init__(
        self, files: dict[str, bytes], *, repo: str, commit: str, branch: str = "main", lfs: tuple[str, ...] = LFS
    ) -> None:
        self.files, self.repo, self.commit, self.branch, self.lfs = dict(files), repo, commit, branch, lfs
        self.log: list[Request] = []
        self.authorizations: list[tuple[str, str | None]] = []  # requested host, Authorization header
        self.listed_commit = commit  # the commit that the listing names
        self.listed_names: list[str] = []  # additional names in the listing
        self.listed_sizes: dict[str, int] = {}  # wrong sizes in the listing
        self.errors: dict[str, tuple[int, str]] = {}  # "listing", "files" or a name: HTTP status, X-Error-Code
        self.pages: dict[str, bytes] = {}  # "listing" or a name: a body to send in its place
        self.cuts: dict[str, list[int]] = {}  # name: offsets at which to end the connection, one per answer
        self.resets = False  # cuts are resets (RST) instead of orderly ends (FIN)
        self.holds: dict[str, int] = {}  # name: offset at which to stop sending until the context is closed
        self.held = threading.Event()  # set when an answer has reached its hold
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def listing(self) -> dict[str, Any]:
        """Return what the API says about the repository."""
        files = [self._entry(name, content) for name, content in self.files.items()]
        extra = [self._entry(name, b"hostile") for name in self.listed_names]
        return {"id": self.repo, "sha": self.listed_commit, "siblings": extra + files}

    def _entry(self, name: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"rfilename": name, "size": self.listed_sizes.get(name, len(content))}
        if name.endswith(self.lfs):
            sha256 = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
            content = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\n".encode()
        entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return entry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms for the client to acknowledge the headers

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a test's client may be killed
            super().handle()

    def do_GET(self) -> None:
        self._answer(cast(HubServer, self.server.hub))  # type: ignore[attr-defined]

    do_HEAD = do_GET

    def _answer(self, hub: HubServer) -> None:
        path = unquote(urlsplit(self.path).path)
        hub.log.append(Request(self.command, path, self.headers["Range"]))
        hub.authorizations.append((self.headers["Host"].split(":")[0], self.headers["Authorization"]))
        api = re.fullmatch(r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>.+)", path)
        file = re.fullmatch(r"/(?P<repo>[^/]+/[^/]+)/(?P<host>resolve|cdn)/(?P<revision>[^/]+)/(?P<name>.+)", path)
        asked = api or file
        if not asked or asked["repo"] != hub.repo:
            return self._send(404, {"X-Error-Code": "RepoNotFound"})
        if asked["revision"] not in (hub.commit, hub.branch):
            return self._send(404, {"X-Error-Code": "RevisionNotFound"})
        for key in ("files", file["name"]) if file else ("listing",):
            if key in hub.errors:
                status, code = hub.errors[key]
                return self._send(status, {"X-Error-Code": code} if code else {})
        if not file:
            return self._send(200, {}, hub.pages.get("listing") or json.dumps(hub.listing()).encode())
        if file["name"] not in hub.files:
            return self._send(404, {"X-Error-Code": "EntryNotFound"})
        return self._send_file(hub, file["name"], on_hub=file["host"] == "resolve")

    def _send_file(self, hub: HubServer, name: str, *, on_hub: bool) -> None:
        entry = hub._entry(name, hub.files[name])
        headers = {"X-Repo-Commit": hub.commit, "Accept-Ranges": "bytes"}
        if "lfs" in entry and on_hub:
            headers["X-Linked-Etag"] = f'"{entry["lfs"]["sha256"]}"'
            headers["X-Linked-Size"] = str(entry["lfs"]["size"])
            headers["Location"] = f"http://localhost:{hub.port}/{hub.repo}/cdn/{hub.commit}/{quote(name)}"
            return self._send(302, headers)
        content, status, start = hub.pages.get(name, hub.files[name]), 200, 0
        headers["ETag"] = f'"{entry["blobId"]}"'
        if self.headers["Range"]:
            status, start = 206, int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self._send(status, headers, content[start:], name=name, start=start)

    def _send(self, status: int, headers: dict[str, str], body: bytes = b"", *, name: str = "", start: int = 0) -> None:
        hub = cast(HubServer, self.server.hub)  # type: ignore[attr-defined]
        self.send_response(status)
        for header, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if name in hub.holds:
            self.wfile.write(body[: hub.holds[name] - start])
            hub.held.set()
            hub.closing.wait()
        elif hub.cuts.get(name):
            self.wfile.write(body[: max(0, hub.cuts[name].pop(0) - start)])
            self.close_connection = True
            if hub.resets:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
        else:
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing, since the tests read `HubServer.log`."""
