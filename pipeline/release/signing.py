"""Sign release.json with a key, and verify it offline: all that a consumer needs is the public key.

The signature is a Sigstore bundle of OpenSSF model signing over a directory that holds only release.json. That file
states model, variant, version and the hash of every file.
"""

import tempfile
from pathlib import Path

from pipeline.common.errors import PipelineError
from pipeline.release.release import RELEASE


def sign(release: bytes, key: Path) -> bytes:
    """Return the signature of release.json's bytes `release` with the private EC key in the PEM file `key`.

    Raises PipelineError when the file holds no such key.
    """
    from model_signing import signing

    with tempfile.TemporaryDirectory(prefix="phi3-sign-") as folder:
        directory, signature = _lay_out(Path(folder), release)
        try:
            signer = signing.Config().use_elliptic_key_signer(private_key=key)
        except (ValueError, TypeError, OSError) as error:
            raise PipelineError(
                f"{key} holds no private EC key without a password: make one with `openssl ecparam -name prime256v1 "
                "-genkey -noout -out key.pem`."
            ) from error
        signer.sign(directory, signature)
        return signature.read_bytes()


def require_signature(release: bytes, signature: bytes | None, key: Path, *, origin: str) -> None:
    """Raise PipelineError unless `signature` is that of `release` by the owner of the public key in the file `key`."""
    from model_signing import verifying

    if signature is None:
        raise PipelineError(f"{origin} is not signed, and a key was given: it is refused.")
    with tempfile.TemporaryDirectory(prefix="phi3-verify-") as folder:
        directory, file = _lay_out(Path(folder), release)
        file.write_bytes(signature)
        try:
            verifier = verifying.Config().use_elliptic_key_verifier(public_key=key)
        except (ValueError, TypeError, OSError) as error:
            raise PipelineError(f"{key} holds no public EC key in PEM form.") from error
        try:
            verifier.verify(directory, file)
        except Exception as error:  # a hostile signature may raise any error; it is not valid
            raise PipelineError(f"{origin} is not signed by the owner of {key}: it is refused.") from error


def _lay_out(folder: Path, release: bytes) -> tuple[Path, Path]:
    directory = folder / "release"
    directory.mkdir()
    (directory / RELEASE).write_bytes(release)
    return directory, folder / "signature"
