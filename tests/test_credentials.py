"""Pictures are signed with a certificate made here, read back by the C2PA library, and found out when changed."""

import datetime
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.config import UserError
from pipelines.cli import main as ldm
from pipelines.credentials import Credentials, state
from pipelines.safety import SOURCE_TYPE, provenance

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8))


def certified(folder: Path, kind: str, *, vouched: bool = True) -> Credentials:
    """A new key and its certificate, signed by another's made for it or by itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives import serialization as pem
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    makers = {
        "ec": lambda: ec.generate_private_key(ec.SECP256R1()),
        "rsa": lambda: rsa.generate_private_key(65537, 2048),
        "ed25519": ed25519.Ed25519PrivateKey.generate,
    }
    authority, own = ec.generate_private_key(ec.SECP256R1()), makers[kind]()
    names = [x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, name)]) for name in ("voucher", "me")]
    now = datetime.datetime.now(datetime.UTC)
    chain = []
    for subject, key, voucher in ((names[1], own, not vouched), (names[0], authority, True)):
        use = dict.fromkeys(("content_commitment", "key_encipherment", "data_encipherment"), False)
        use |= dict.fromkeys(("key_agreement", "encipher_only", "decipher_only"), False)
        signs = x509.KeyUsage(digital_signature=True, key_cert_sign=voucher, crl_sign=voucher, **use)
        made = (
            x509.CertificateBuilder(subject_name=subject, issuer_name=names[0] if vouched else subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=voucher, path_length=None), critical=True)
            .add_extension(signs, critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False
            )
        )
        chain.append(made.sign(authority if vouched else key, hashes.SHA256()))
    folder.mkdir(exist_ok=True)
    (folder / "chain.pem").write_bytes(b"".join(one.public_bytes(pem.Encoding.PEM) for one in chain))
    private = own.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())
    (folder / "key.pem").write_bytes(private)
    return Credentials(chain=folder / "chain.pem", key=folder / "key.pem")


@pytest.mark.parametrize("kind", ["ec", "rsa", "ed25519"])
def test_a_signed_picture_says_that_a_model_made_it_and_can_not_be_changed(tmp_path: Path, kind: str) -> None:
    c2pa = pytest.importorskip("c2pa", reason="content credentials are optional")
    file = tmp_path / "a.png"
    PICTURE.save(file, pnginfo=provenance(prompt="a pear"))
    assert state(file) is None
    credentials = certified(tmp_path / "me", kind)
    credentials.require()
    credentials.sign(file)
    assert state(file) == "Valid"
    with Image.open(file) as image:
        assert np.array_equal(np.asarray(image), np.asarray(PICTURE)) and image.text["prompt"] == "a pear"
    with c2pa.Reader(str(file)) as reader:
        assert SOURCE_TYPE in reader.json()
    data = bytearray(file.read_bytes())
    data[data.index(b"IDAT") + 100] ^= 1
    file.write_bytes(data)
    assert state(file) == "Invalid"


def test_what_can_not_sign_is_one_sentence_beforehand(tmp_path: Path) -> None:
    pytest.importorskip("c2pa", reason="content credentials are optional")
    good, other = (certified(tmp_path / name, "ec") for name in ("good", "other"))
    (tmp_path / "text.pem").write_text("hello")
    for chain, key in (
        (tmp_path / "nowhere.pem", good.key),
        (good.chain, tmp_path / "text.pem"),
        (tmp_path / "text.pem", good.key),
        (good.chain, other.key),
        (certified(tmp_path / "alone", "ec", vouched=False).chain, tmp_path / "alone" / "key.pem"),
    ):
        with pytest.raises(UserError, match="can't sign pictures: ") as refused:
            Credentials(chain=chain, key=key).require()
        assert "\n" not in str(refused.value) and "PRIVATE KEY-----" not in str(refused.value)


def test_without_the_package_it_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(UserError, match="pip install c2pa-python"):
        Credentials(chain=tmp_path / "chain.pem", key=tmp_path / "key.pem").require()


def test_the_commands_sign_what_they_draw_or_say_why_not(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("c2pa", reason="content credentials are optional")
    me = certified(tmp_path / "me", "ec")
    words = ["generate", str(chain / "ldm"), "a red circle", "--steps", "2", "--out", str(tmp_path / "out")]
    ldm([*words, "--credentials", str(me.chain), str(me.key)])
    assert {state(tmp_path / "out" / name) for name in ("0000.png", "sheet.png")} == {"Valid"}
    publish = ["publish", str(chain / "ldm"), "me/model", "--license", "mit", "--dry-run"]
    for verb in (words, publish):
        with pytest.raises(SystemExit):
            ldm([*verb, "--out", str(tmp_path / "none"), "--credentials", str(me.key), str(me.key)])
        assert "can't sign pictures" in capsys.readouterr().err and not (tmp_path / "none").exists()
