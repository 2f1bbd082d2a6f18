"""PostgreSQL on mounted exports, data and WAL apart: nbdfuse, a loop device, ext4. Needs root."""

import glob
import os
import shutil
import subprocess
import time

from sites import run, wait_for

os.environ["PATH"] += ":/usr/sbin:/sbin"


def require(condition, text):
    if not condition:
        raise SystemExit(f"FAILED: {text}")


class Mount:
    """An export as a mounted file system: nbdfuse, a loop device, ext4."""

    def __init__(self, site, export, target, make):
        self.fuse = os.path.join(site.path, f"fuse-{export}")
        self.target = target
        os.makedirs(self.fuse, exist_ok=True)
        os.makedirs(target, exist_ok=True)
        self.process = subprocess.Popen(["nbdfuse", f"{self.fuse}/nbd", site.uri(export)], stdin=subprocess.DEVNULL)
        self.loop = None
        wait_for(lambda: os.path.exists(f"{self.fuse}/nbd"), what="nbdfuse")
        self.loop = run("losetup", "-f", "--show", f"{self.fuse}/nbd").stdout.strip()
        if make:
            run("mkfs.ext4", "-q", "-E", "nodiscard", self.loop)
        run("mount", "-o", "noatime", self.loop, target)

    def end(self):
        """Works for a live and for a dead server: the loop device lets go once nothing has the file system open."""
        for _ in range(50):
            done = run("umount", self.target, check=False)
            if done.returncode == 0 or "not mounted" in done.stderr:
                break
            time.sleep(0.1)
        else:
            run("umount", "-l", self.target, check=False)
        if self.loop:
            run("losetup", "-d", self.loop, check=False)
            for _ in range(50):
                if not run("losetup", "-l", "-n", self.loop, check=False).stdout.strip():
                    break
                time.sleep(0.1)
        run("fusermount3", "-uz", self.fuse, check=False)
        self.process.terminate()
        self.process.wait()


class Postgres:
    def __init__(self, directory, host):
        found = sorted(glob.glob("/usr/lib/postgresql/*/bin"))
        require(found, "PostgreSQL is not installed; scripts/bootstrap postgres installs it")
        self.bin = found[-1]
        self.sockets = os.path.join(directory, f"pg-sockets-{host}")
        os.makedirs(self.sockets, exist_ok=True)
        shutil.chown(self.sockets, "postgres")
        self.data = os.path.join(directory, "mnt-data", "pg")
        self.wal = os.path.join(directory, "mnt-wal", "wal")

    def as_postgres(self, *words, **options):
        return run("runuser", "-u", "postgres", "--", *words, **options)

    def initialise(self):
        for path in (self.data, self.wal):
            os.makedirs(path)
            shutil.chown(path, "postgres")
            os.chmod(path, 0o700)
        self.as_postgres(f"{self.bin}/initdb", "--data-checksums", "-D", self.data, "-X", self.wal, "--no-instructions")
        self.configure()

    def configure(self):
        with open(f"{self.data}/postgresql.conf", "a") as file:
            file.write(f"listen_addresses = ''\nunix_socket_directories = '{self.sockets}'\n"
                       "checkpoint_timeout = 30s\nmax_wal_size = 128MB\nshared_buffers = 32MB\n")
            file.flush()
            os.fsync(file.fileno())

    def start(self):
        started = self.as_postgres(
            f"{self.bin}/pg_ctl", "-D", self.data, "-w", "-l", f"{self.sockets}/log", "start", check=False)
        if started.returncode != 0:
            with open(f"{self.sockets}/log") as file:
                require(False, "PostgreSQL does not start:\n" + "".join(file.readlines()[-20:]))

    def stop(self, mode="fast", check=True):
        self.as_postgres(f"{self.bin}/pg_ctl", "-D", self.data, "-m", mode, "-t", "20", "stop", check=check)

    def kill(self):
        """The host of the dead site: its server processes end as on a machine that goes down."""
        if self.postmaster:
            run("kill", "-STOP", self.postmaster, check=False)  # or it would start new children
            run("pkill", "-KILL", "-P", self.postmaster, check=False)
            run("kill", "-KILL", self.postmaster, check=False)

    def note_postmaster(self):
        with open(f"{self.data}/postmaster.pid") as file:
            self.postmaster = file.readline().strip()

    postmaster = None

    def sql(self, text):
        return self.as_postgres("psql", "-h", self.sockets, "-Atc", text, "postgres").stdout.strip()
