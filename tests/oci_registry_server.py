"""Debian's docker-registry on loopback, and a small issuer of its tokens."""

import base64
import datetime
import json
import re
import secrets
import shutil
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.helpers import ROOT, phi3, run

CONFIG = """
version: 0.1
log: {{level: info, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {root}}}}}
http: {{addr: "127.0.0.1:0"}}
{auth}
"""


class Issuer:
    """A server that gives tokens for the scope that is asked for: to read to everybody, to write with the password.

    Protocol: https://distribution.github.io/distribution/spec/auth/token/ and, for the token itself, spec/auth/jwt/
    """

    def __init__(self, folder):
        self.asked = []  # the scope of each token
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "issuer")])
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder(name, name, self._key.public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .sign(self._key, hashes.SHA256())
        )
        self.certificate = folder / "issuer.pem"
        self.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        self._chain = [base64.b64encode(certificate.public_bytes(serialization.Encoding.DER)).decode()]
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                wanted = parse_qs(urlparse(self.path).query).get("scope", [""])[0]
                issuer.asked.append(wanted)
                known = self.headers.get("Authorization") == f"Basic {base64.b64encode(b'user:s3cret').decode()}"
                if "Authorization" in self.headers and not known:
                    self.send_error(401)
                    return
                body = json.dumps({"token": issuer.token(wanted, write=known)}).encode()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/token"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def token(self, scope, *, write=True, seconds=300):
        """Return a token for `scope`; without `write` only for reading."""
        access = []
        if scope:
            kind, name, actions = scope.split(":")
            allowed = [action for action in actions.split(",") if write or action == "pull"]
            access = [{"type": kind, "name": name, "actions": allowed}]
        start = int(time.time()) - 3600
        claims = {"iss": "issuer", "sub": "user", "aud": "registry", "access": access, "jti": secrets.token_hex(8)}
        claims |= {"nbf": start, "iat": start, "exp": start + 3600 + seconds}
        return jwt.encode(claims, self._key, algorithm="ES256", headers={"x5c": self._chain})


class OciRegistryServer:
    """A running docker-registry: its address, its folder and the environment for `phi3`."""

    def __init__(self, folder, *, password=False, tokens=False):
        if not shutil.which("docker-registry"):
            pytest.fail("docker-registry is missing: run `make test`, or install it")
        self.root = folder / "data"
        folder.mkdir()
        auth = ""
        if password:
            import bcrypt

            hashed = bcrypt.hashpw(b"s3cret", bcrypt.gensalt(4, prefix=b"2a")).decode()
            (folder / "htpasswd").write_text(f"user:{hashed}\n")
            auth = f"auth: {{htpasswd: {{realm: test, path: {folder / 'htpasswd'}}}}}"
        self.issuer = Issuer(folder) if tokens else None
        if self.issuer:
            options = f"realm: {self.issuer.url}, service: registry, issuer: issuer"
            auth = f"auth: {{token: {{{options}, rootcertbundle: {self.issuer.certificate}}}}}"
        self.home = folder / "home"
        self.home.mkdir()
        (folder / "config.yml").write_text(CONFIG.format(root=self.root, auth=auth))
        self._log = folder / "log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(["docker-registry", "serve", str(folder / "config.yml")], stderr=log)
        self.host = self._address()
        self.url = f"oci:{self.host}/models/tiny"

    def _address(self):
        # Wait until the registry says on which free port it listens.
        while self.process.poll() is None:
            if said := re.search(r"listening on (127\.0\.0\.1:\d+)", self._log.read_text()):
                return said[1]
            time.sleep(0.02)
        pytest.fail(f"docker-registry did not start: {self._log.read_text()}")

    def login(self, secret):
        """Write the credentials that `docker login` would write."""
        (self.home / ".docker").mkdir(exist_ok=True)
        auths = {self.host: {"auth": base64.b64encode(f"user:{secret}".encode()).decode()}}
        (self.home / ".docker/config.json").write_text(json.dumps({"auths": auths}))

    def phi3(self, *arguments, check=True):
        """Run the command `phi3` in this process, with this home."""
        return phi3(*arguments, check=check, HOME=str(self.home))

    def phi3_process(self, *arguments, program=("phi3",)):
        """Run `phi3`, or a program with its arguments, as a process of its own with this home."""
        return run(*program, *arguments, cwd=Path.cwd(), check=False, PYTHONPATH=str(ROOT), HOME=str(self.home))

    def stop(self):
        """End the registry."""
        self.process.terminate()
        self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()
        if self.issuer:
            self.issuer.server.shutdown()
            self.issuer.server.server_close()
