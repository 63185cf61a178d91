"""Certificates, keys and tenants for a release that asks for them, as the secrets that the chart mounts.

Needs openssl.
"""

import json
import subprocess

ROLES = ("router", "base", "reward")
NEW_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
DAYS = "2"  # longer than any test


class Authority:
    """One that signs certificates in a folder."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        self.openssl("req", "-x509", *NEW_KEY, "-days", DAYS, "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.crt")

    def openssl(self, *arguments):
        subprocess.run(["openssl", *arguments], cwd=self.folder, capture_output=True, check=True)

    def certificate(self, name, host):
        """A secret of type kubernetes.io/tls with ca.crt, for DNS:… or IP:…."""
        (self.folder / f"{name}.ext").write_text(f"subjectAltName={host}\nextendedKeyUsage=serverAuth,clientAuth\n", encoding="utf-8")
        self.openssl("req", *NEW_KEY, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        signed = ["-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", f"{name}.ext"]
        self.openssl("x509", "-req", "-days", DAYS, *signed, "-out", f"{name}.crt")
        files = {"ca.crt": "ca.crt", "tls.crt": f"{name}.crt", "tls.key": f"{name}.key"}
        return {key: (self.folder / file).read_text(encoding="utf-8") for key, file in files.items()}


def secrets(uniarm, release, front, folder):
    """{name: {key: text}} for mutual TLS by roles, TLS at the address `front`, and one tenant with a key."""
    authority = Authority(folder)
    made = {f"{release}-{role}-tls": authority.certificate(role, f"DNS:{role}.uniarm.internal") for role in ROLES}
    drawn = subprocess.run([uniarm, "keys", "new", "--json"], capture_output=True, text=True, check=True).stdout
    key = json.loads(drawn)
    return {
        **made,
        "front": authority.certificate("front", f"IP:{front}"),
        "front-ca": {"ca.crt": (folder / "ca.crt").read_text(encoding="utf-8")},
        "tenants": {"tenants.toml": f'[[tenants]]\nname = "trial"\nkeys = ["{key["hash"]}"]\n'},
        "key": {"key": key["key"]},
    }
