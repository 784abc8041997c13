"""Debian's docker-registry on loopback."""

import base64
import json
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
import requests

from tests.conftest import ROOT, run

CONFIG = """
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {root}}}}}
http: {{addr: "127.0.0.1:{port}"}}
{auth}
"""


class Registry:
    """A running docker-registry: its address, its folder and the environment for `phi3`."""

    def __init__(self, folder, *, password=False):
        if not shutil.which("docker-registry"):
            pytest.fail("docker-registry is missing: run `make test`, or install it")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.host = f"127.0.0.1:{free.getsockname()[1]}"
        self.url, self.root = f"oci:{self.host}/models/tiny", folder / "data"
        folder.mkdir()
        auth = ""
        if password:
            import bcrypt

            hashed = bcrypt.hashpw(b"s3cret", bcrypt.gensalt(4, prefix=b"2a")).decode()
            (folder / "htpasswd").write_text(f"user:{hashed}\n")
            auth = f"auth: {{htpasswd: {{realm: test, path: {folder / 'htpasswd'}}}}}"
        port = self.host.split(":")[1]
        (folder / "config.yml").write_text(CONFIG.format(root=self.root, port=port, auth=auth))
        self.home = folder / "home"
        self.home.mkdir()
        self.process = subprocess.Popen(["docker-registry", "serve", str(folder / "config.yml")])
        for _ in range(100):
            try:
                requests.get(f"http://{self.host}/v2/", timeout=1)
                break
            except requests.ConnectionError:
                time.sleep(0.1)

    def login(self, secret):
        """Write the credentials that `docker login` would write."""
        (self.home / ".docker").mkdir(exist_ok=True)
        auths = {self.host: {"auth": base64.b64encode(f"user:{secret}".encode()).decode()}}
        (self.home / ".docker/config.json").write_text(json.dumps({"auths": auths}))

    def phi3(self, *arguments, check=True, program=("phi3",)):
        """Run `phi3`, or a program with its arguments, with this home."""
        return run(*program, *arguments, cwd=Path.cwd(), check=check, PYTHONPATH=str(ROOT), HOME=str(self.home))

    def stop(self):
        """End the registry."""
        self.process.terminate()
        self.process.wait()
