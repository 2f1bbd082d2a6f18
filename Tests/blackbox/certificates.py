"""Certificates and keys for the tests, made by certtool and psktool in the layout that qemu, nbdkit and libnbd share."""

import os
import shutil

from sites import run


def template(path, lines):
    with open(path, "w") as file:
        file.write("\n".join(lines) + "\n")
    return path


def key(path):
    run("certtool", "--generate-privkey", "--key-type=ecdsa", "--outfile", path)
    return path


class Authority:
    """A certificate authority in `directory`, which also holds the server's certificate."""

    def __init__(self, directory, name="Test authority"):
        os.makedirs(directory, exist_ok=True)
        self.directory = directory
        self.key = key(os.path.join(directory, "ca-key.pem"))
        self.certificate = os.path.join(directory, "ca-cert.pem")
        info = template(os.path.join(directory, "ca.info"), [f"cn = {name}", "ca", "cert_signing_key", "crl_signing_key"])
        run("certtool", "--generate-self-signed", "--load-privkey", self.key, "--template", info,
            "--outfile", self.certificate)
        self.sign(directory, "server", "localhost", ["dns_name = localhost", "ip_address = 127.0.0.1", "tls_www_server"])

    def sign(self, directory, role, name, lines):
        base = os.path.join(directory, role)
        info = template(f"{base}.info", [f"cn = {name}", "encryption_key", "signing_key", *lines])
        run("certtool", "--generate-certificate", "--load-ca-certificate", self.certificate, "--load-ca-privkey", self.key,
            "--load-privkey", key(f"{base}-key.pem"), "--template", info, "--outfile", f"{base}-cert.pem")

    def client(self, directory, name):
        """A directory that a client named `name` uses."""
        os.makedirs(directory, exist_ok=True)
        if directory != self.directory:
            shutil.copy(self.certificate, directory)
        self.sign(directory, "client", name, ["tls_www_client"])
        return directory

    def revoke(self, directory):
        """Withdraws the client certificate of `directory`."""
        info = template(os.path.join(self.directory, "crl.info"), ["crl_next_update = 365", "crl_number = 1"])
        run("certtool", "--generate-crl", "--load-ca-certificate", self.certificate, "--load-ca-privkey", self.key,
            "--load-certificate", os.path.join(directory, "client-cert.pem"), "--template", info,
            "--outfile", os.path.join(self.directory, "ca-crl.pem"))


def psk_file(path, *users):
    for user in users:
        run("psktool", "--username", user, "--pskfile", path)
    return path
