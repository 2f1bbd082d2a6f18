"""Sites for the black-box tests: real processes, in a directory of their own, gone when the test ends."""

import contextlib
import ctypes
import faulthandler
import json
import os
import shutil
import signal
import struct
import subprocess
import tempfile
import time
import unittest

import nbd

from link import Link

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
FARCOPY = os.environ.get("FARCOPY", os.path.join(ROOT, ".build/release/farcopy"))


def run(*words, check=True, timeout=120, **options):
    """Runs a command and returns the finished process, output as text."""
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **options)
    try:
        output, errors = process.communicate(timeout=timeout)
    except BaseException:
        end_group(process)
        raise
    done = subprocess.CompletedProcess(words, process.returncode, output, errors)
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done


def end_group(process):
    """Ends a process that leads a group, and those that it has started in it. (fio takes its jobs' processes out of it; with
    `--thread` it has none.)"""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream:
            stream.close()


def die_with_parent():
    """Runs in the child: a test that is itself killed leaves no server behind (prctl PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def crc32c(data):
    if not CRC_TABLE:
        for index in range(256):
            value = index
            for _ in range(8):
                value = (value >> 1) ^ 0x82F63B78 if value & 1 else value >> 1
            CRC_TABLE.append(value)
    value = 0xffffffff
    for byte in data:
        value = (value >> 8) ^ CRC_TABLE[(value ^ byte) & 255]
    return value ^ 0xffffffff


def byte_count(size):
    """Bytes of "16MiB", as configurations give them."""
    units = {"KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}
    return int(size[:-3]) << units[size[-3:]] if size[-3:] in units else int(size)


def device_at(path, size, sector):
    """A loop device with a link to it at `path`, so that whoever opens the volume's file by its name has the device."""
    from laboratory import LoopDevice  # only this needs root
    device = LoopDevice(path + ".under", byte_count(size), sector)
    if os.path.lexists(path):
        os.unlink(path)
    os.symlink(device.path, path)
    return device


SECTOR = int(os.environ.get("FARCOPY_DEVICES", "0"))
# Lines for the groups of pairs of sites, such as a mode.
GROUP_LINES = os.environ.get("GROUP_LINES", "").replace("\\n", "\n")
# How often tests with chance in them repeat it (`make test-long`).
REPEAT = int(os.environ.get("REPEAT", "1"))
not_on_devices = unittest.skipIf(SECTOR, "what files have and devices do not: holes, names, sizes that change")
CRC_TABLE = []
RECORD_SPACE = 256 << 10


def rewrite_record(path, change):
    """Changes the JSON of a record (docs/FORMAT.md) in both of its copies."""
    with open(path, "rb") as file:
        data = bytearray(file.read())
    for start in (0, RECORD_SPACE):
        if bytes(data[start:start + 8]) != b"FARCOPY1":
            continue
        length = struct.unpack("<I", data[start + 16:start + 20])[0]
        payload = json.loads(bytes(data[start + 32:start + 32 + length]))
        change(payload)
        text = json.dumps(payload, separators=(",", ":"), sort_keys=True).encode()
        data[start + 16:start + 20] = struct.pack("<I", len(text))
        data[start + 32:start + 32 + len(text)] = text
        data[start + 20:start + 24] = struct.pack(
            "<I", crc32c(data[start:start + 20] + data[start + 24:start + 32] + text))
    with open(path, "wb") as file:
        file.write(data)


class Site:
    """One `farcopy serve` with its files below `directory`; its state directory is `state`, its volumes lie in `data`, where they
    are not given. `FARCOPY_DEVICES=512` or `4096` makes volumes of block devices with such sectors."""

    def __init__(self, directory, name, volumes, groups="", peers=(), nbd_listen=(), extra="", state=None, data=None):
        self.name = name
        self.path = os.path.join(directory, name)
        os.makedirs(self.path, exist_ok=True)
        self.state = state or os.path.join(self.path, "state")
        self.data = data or self.path
        self.devices = {}
        self.socket = os.path.join(self.path, "nbd.sock")
        self.control = "unix:" + os.path.join(self.path, "control.sock")
        self.config = os.path.join(self.path, "site.toml")
        self.process = None
        self.program = FARCOPY
        self.prefix = []  # words before the program, which must `exec` it
        self.environment = None
        self.log = os.path.join(self.path, "log")
        listen = ", ".join(f'"{address}"' for address in (f"unix:{self.socket}", *nbd_listen))
        text = f"""[site]
name = "{name}"
state = "{self.state}"
control = ["{self.control}"]
targets = ["{directory}", "/dev"]
[nbd]
listen = [{listen}]
"""
        for volume, size in volumes.items():
            text += f'[volumes.{volume}]\npath = "{self.image(volume)}"\nsize = "{size}"\n'
            if SECTOR:
                self.devices[volume] = device_at(self.image(volume), size, SECTOR)
        for peer in peers:
            other = os.path.join(directory, peer)
            text += f'[peers.{peer}]\nnbd = "unix:{other}/nbd.sock"\ncontrol = "unix:{other}/control.sock"\n'
        with open(self.config, "w") as file:
            file.write(text + groups + extra)

    def image(self, volume):
        """The volume's file, or a link to its device."""
        return os.path.join(self.data, f"{volume}.img")

    def edit(self, old, new):
        """Changes the configuration for the next start."""
        with open(self.config) as file:
            text = file.read()
        assert old in text, f"{old!r} is not in the configuration"
        with open(self.config, "w") as file:
            file.write(text.replace(old, new))

    def start(self, wait=True):
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [*self.prefix, self.program, "serve", "--config", self.config], stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=log, text=True, preexec_fn=die_with_parent, env=self.environment)
        if wait:
            line = self.process.stdout.readline()
            if line != "ready\n":
                self.process.wait()
                raise AssertionError(f"{self.name} did not start: {line!r}\n{self.tail()}")
        return self

    def tail(self):
        with open(self.log) as file:
            return "".join(file.readlines()[-15:])

    def kill(self, how=signal.SIGKILL):
        if self.process is None:
            return
        if self.process.poll() is not None and how == signal.SIGKILL:
            code = self.process.returncode
            self.process = None
            raise AssertionError(f"{self.name} had ended by itself with {code}\n{self.tail()}")
        self.process.send_signal(how)
        self.process.wait(timeout=60)
        self.process.stdout.close()
        self.process = None

    def stop(self):
        self.kill(signal.SIGTERM)

    def lose_power(self):
        """Ends the process and makes its records those of another boot: what a machine that went down would find, except
        that nothing that was written is missing."""
        self.kill()
        volumes = os.path.join(self.state, "volumes")
        for name in os.listdir(volumes):
            rewrite_record(os.path.join(volumes, name, "volume.record"), lambda record: record.update(bootID="another boot"))

    def sockets(self):
        """How many sockets the process has open."""
        directory, count = f"/proc/{self.process.pid}/fd", 0
        for number in os.listdir(directory):
            try:
                count += os.readlink(f"{directory}/{number}").startswith("socket:")
            except FileNotFoundError:
                pass
        return count

    def resident(self):
        """Bytes of memory that the process has in use."""
        with open(f"/proc/{self.process.pid}/status") as file:
            return int(next(line for line in file if line.startswith("VmRSS")).split()[1]) << 10

    def points(self, group="shop"):
        return json.loads(self.farcopy("points", group, "--json").stdout)

    def end(self):
        """Clean-up: whatever state the process is in."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            self.process = None

    def release(self):
        """Clean-up, after the end: devices that the site was given."""
        for device in self.devices.values():
            device.detach()
        self.devices = {}

    def farcopy(self, *words, check=True, timeout=120):
        return run(FARCOPY, *words, "--control", self.control, check=check, timeout=timeout)

    def status(self):
        return json.loads(self.farcopy("status", "--json").stdout)

    def group(self, name="shop"):
        return self.status()["groups"][name]

    def cycle(self, group="shop"):
        """Forms and commits a point; returns its number."""
        return int(self.farcopy("cycle", group, "--wait").stdout)

    def uri(self, export):
        return f"nbd+unix:///{export}?socket={self.socket}"

    def connect(self, export):
        handle = nbd.NBD()
        handle.connect_uri(self.uri(export))
        return handle

    def read(self, export):
        """The whole export, through nbdcopy."""
        target = os.path.join(self.path, "read.out")
        run("nbdcopy", self.uri(export), target)
        with open(target, "rb") as file:
            data = file.read()
        os.unlink(target)
        return data


def read_handle(handle):
    """The whole export of an open connection."""
    size = handle.get_size()
    step = 4 << 20
    return b"".join(bytes(handle.pread(min(step, size - at), at)) for at in range(0, size, step))


def wait_for(condition, seconds=30, what="the condition"):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(f"{what} did not come about within {seconds} s")


class SiteTest(unittest.TestCase):
    """Gives each test a directory and ends its sites whatever happens."""

    def setUp(self):
        faulthandler.dump_traceback_later(120, exit=True)
        self.addCleanup(faulthandler.cancel_dump_traceback_later)
        self.directory = tempfile.mkdtemp(prefix="farcopy-test-", dir=os.environ.get("TMPDIR", "/tmp"))
        self.sites = []
        self.addCleanup(self.clean_up)

    def clean_up(self):
        for site in self.sites:
            site.end()
        for site in self.sites:
            site.release()
        shutil.rmtree(self.directory, ignore_errors=True)

    def spawn(self, *words, stdin=subprocess.DEVNULL, **options):
        """A process that runs beside the test and ends with it, whatever happens, with all that it has started."""
        process = subprocess.Popen(words, stdin=stdin, start_new_session=True, preexec_fn=die_with_parent, **options)
        self.addCleanup(end_group, process)
        return process

    def make_site(self, name, volumes, **options):
        return Site(self.directory, name, volumes, **options)

    def site(self, name, volumes, start=True, **options):
        site = self.make_site(name, volumes, **options)
        self.sites.append(site)
        return site.start() if start else site

    def refused(self, site, *expected):
        """The site does not start, and its log says all of this."""
        site.start(wait=False)
        self.assertEqual(site.process.wait(timeout=30), 1)
        site.process.stdout.close()
        site.process = None
        for text in expected:
            self.assertIn(text, site.tail())

    def put_away(self, *sites):
        """Ends sites so that others of the same name can take their place."""
        for site in sites:
            site.end()
            site.release()
            self.sites.remove(site)
            shutil.rmtree(site.path)

    def pair(self, volumes, interval="0s", keep=8, start=True, extra="", options=""):
        """East, the primary, and west, the secondary, of group `shop` over all the volumes; `options` are lines for the group
        at both, as GROUP_LINES are for every such group."""
        options = 'isolation_timeout = "300ms"\n' + options + "\n" + GROUP_LINES
        names = ", ".join(f'"{name}"' for name in volumes)
        east = self.site(
            "east", volumes, start=False, peers=["west"], extra=extra,
            groups=f'[groups.shop]\nvolumes = [{names}]\nrole = "primary"\npeer = "west"\ninterval = "{interval}"\n'
                   f'keep = {keep}\n{options}\n')
        west = self.site(
            "west", volumes, start=False, peers=["east"], extra=extra,
            groups=f'[groups.shop]\nvolumes = [{names}]\nrole = "secondary"\npeer = "east"\ninterval = "{interval}"\n'
                   f'keep = {keep}\n{options}\n')
        if start:
            west.start()
            east.start()
        return east, west

    def linked(self, volumes, interval="manual", start=True, options="", **link):
        """A pair whose traffic goes through a Link, `self.link`."""
        east, west = self.pair(volumes, interval=interval, start=False, options=options)
        self.link = Link(**link)
        self.addCleanup(self.link.close)
        self.link.join(east, west)
        if start:
            west.start()
            east.start()
        return east, west
