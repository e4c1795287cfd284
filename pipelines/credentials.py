"""Content credentials (C2PA): a signed statement in a picture file that a model made it, which editors and sites show.

Unlike the notes of `pipelines.safety.provenance` it can't be changed without notice. Needs the package c2pa-python,
`pip install -e ".[credentials]"`, and the person's own certificate; nothing goes over the network.
"""

from __future__ import annotations

import argparse
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.config import UserError
from pipelines.safety import SOURCE_TYPE

CURVES = {256: "es256", 384: "es384", 521: "es512"}  # bits of the key -> name of the signature


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """Who signs."""

    chain: Path
    """PEM file: the certificate, then those that vouch for it"""
    key: Path
    """PEM file: its private key, not encrypted"""

    def sign(self, picture: Path) -> None:
        """Replace a PNG file by the same picture with the statement inside.

        Raises:
            UserError: c2pa-python is not installed, or certificate and key can't sign; says why.
        """
        picture.write_bytes(self.signed(picture.read_bytes(), picture.name))

    def require(self) -> None:
        """UserError now, not after hours of work, if this can't sign."""
        sample = io.BytesIO()
        Image.new("RGB", (8, 8)).save(sample, "PNG")
        self.signed(sample.getvalue(), "sample.png")

    def signed(self, png: bytes, title: str) -> bytes:
        """The bytes of a PNG file with the statement inside."""
        c2pa = library()
        made = {"action": "c2pa.created", "digitalSourceType": SOURCE_TYPE, "softwareAgent": {"name": "ldm"}}
        statement = {
            "claim_generator_info": [{"name": "ldm"}],
            "title": title,
            "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [made]}}],
        }
        out = io.BytesIO()
        try:
            chain, key = self.chain.read_bytes(), self.key.read_bytes()
            signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo(algorithm(key), chain, key, None))
            settings = c2pa.Settings.from_dict({"builder": {"thumbnail": {"enabled": False}}})
            with c2pa.Context(settings, signer) as context, c2pa.Builder(statement, context) as builder:
                builder.sign("image/png", io.BytesIO(png), out)
        except (OSError, ValueError, TypeError, c2pa.C2paError) as problem:
            reason = " ".join(str(problem).split())[:200]
            raise UserError(
                f"{self.chain} and {self.key} can't sign pictures: {reason}; give a PEM file with a certificate for "
                "signing (C2PA profile) and those that vouch for it, and one with its private key."
            ) from None
        return out.getvalue()


def credentials_option(reader: argparse.ArgumentParser) -> None:
    reader.add_argument(
        "--credentials",
        nargs=2,
        type=Path,
        metavar=("CHAIN.pem", "KEY.pem"),
        help="sign the pictures (C2PA) with this certificate and key",
    )


def credentials_of(options: argparse.Namespace) -> Credentials | None:
    """Who signs, if the command line names somebody; UserError if that can't be."""
    if options.credentials is None:
        return None
    chain, key = options.credentials
    signer = Credentials(chain=chain, key=key)
    signer.require()
    return signer


def algorithm(key: bytes) -> str:
    """The name of the signatures that a private key makes; ValueError or TypeError if it can't be used."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    opened = load_pem_private_key(key, password=None)
    if isinstance(opened, ed25519.Ed25519PrivateKey):
        return "ed25519"
    return CURVES[opened.curve.key_size] if isinstance(opened, ec.EllipticCurvePrivateKey) else "ps256"


def state(picture: Path) -> str | None:
    """What is to be said of the statement in a file: Valid, Trusted, or Invalid; None if there is none."""
    c2pa = library()
    try:
        with c2pa.Reader(str(picture)) as reader:
            return str(reader.get_validation_state())
    except (c2pa.C2paError.ManifestNotFound, c2pa.C2paError.NotSupported):
        return None


def library() -> Any:
    try:
        import c2pa
    except ImportError:
        raise UserError(
            "Content credentials need the package c2pa-python; run: pip install c2pa-python"
        ) from None
    return c2pa
