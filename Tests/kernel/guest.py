"""A small machine with a stock Debian kernel, under qemu's software emulation, for the kernel's own NBD client.

The kernel comes from Debian's cloud image package; a busybox initramfs loads the modules; the programs under test lie, with
their libraries, on a read-only ext4 disk that is made from this machine's own. The guest's script talks to the test over the
serial line: a line "HOST word" asks for something, any line back is the answer."""

import glob
import os
import re
import shutil
import stat
import subprocess
import threading

from sites import FARCOPY, ROOT, die_with_parent, run

CACHE = os.environ.get("FARCOPY_KERNEL_CACHE", os.path.join(ROOT, ".build-kernel"))
MODULES = ("virtio_pci", "virtio_net", "virtio_blk", "nbd", "xfs")
PROGRAMS = ("nbd-client", "mkfs.ext4", "e2fsck", "mkfs.xfs", "xfs_repair", "fio", "fstrim", "dmesg")

INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
for module in $(/bin/busybox cat /modules/order); do
    options=""
    [ "$module" = nbd.ko ] && options="nbds_max=4"
    /bin/busybox insmod /modules/$module $options
done
/bin/busybox ifconfig lo 127.0.0.1 up
/bin/busybox ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up
/bin/busybox mount -t ext4 -o ro /dev/vda /disk
for place in proc sys dev; do /bin/busybox mount --bind /$place /disk/$place; done
/bin/busybox mount -t tmpfs tmp /disk/tmp
/bin/busybox chroot /disk /bin/busybox sh /test.sh
echo "GUEST ended with $?"
/bin/busybox poweroff -f
"""

PRELUDE = """
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LD_LIBRARY_PATH=/lib/swift
busybox mkdir -p /tmp/a /tmp/b
fail() { echo "GUEST FAILED: $*"; dmesg | busybox tail -30; exit 1; }
# The emulated serial line may sleep on an answer until something else happens.
host() { echo "HOST $*"; until read -t 1 answer; do :; done; }
mount() { busybox mount "$@"; }
umount() { busybox umount "$@"; }
sleep() { busybox sleep "$@"; }
"""


def kernel():
    """The kernel image and its modules' directory, fetched once."""
    for _ in range(2):
        images = glob.glob(f"{CACHE}/kernel/boot/vmlinuz-*")
        if images:
            version = os.path.basename(images[0]).removeprefix("vmlinuz-")
            return images[0], f"{CACHE}/kernel/lib/modules/{version}", version
        os.makedirs(CACHE, exist_ok=True)
        depends = run("apt-cache", "depends", "linux-image-cloud-amd64").stdout
        package = re.search(r"Depends: (linux-image-\S+)", depends)[1]
        run("apt-get", "download", package, cwd=CACHE)
        run("dpkg-deb", "-x", glob.glob(f"{CACHE}/{package}_*.deb")[0], f"{CACHE}/kernel")
    raise AssertionError("the package of the kernel holds no kernel")


def modules(directory, version):
    """Paths of the modules wanted, each after those that it needs."""
    run("depmod", "-b", os.path.join(directory, "../../.."), version)
    needs = {}
    with open(f"{directory}/modules.dep") as file:
        for line in file:
            path, others = line.rstrip("\n").split(":")
            needs[os.path.basename(path).split(".")[0].replace("-", "_")] = [path, *others.split()]
    ordered = []
    for name in MODULES:
        for path in reversed(needs.get(name, [])):  # a module that is built in is not listed
            if path not in ordered:
                ordered.append(path)
    return [os.path.join(directory, path) for path in ordered]


def initramfs(path):
    image, directory, version = kernel()
    root = f"{path}.d"
    for name in ("bin", "proc", "sys", "dev", "disk", "modules"):
        os.makedirs(f"{root}/{name}", exist_ok=True)
    shutil.copy(shutil.which("busybox") or "/bin/busybox", f"{root}/bin/busybox")
    order = modules(directory, version)
    for module in order:
        shutil.copy(module, f"{root}/modules")
    with open(f"{root}/modules/order", "w") as file:
        file.write("\n".join(os.path.basename(module) for module in order))
    with open(f"{root}/init", "w") as file:
        file.write(INIT)
    os.chmod(f"{root}/init", 0o755)
    with open(path, "wb") as file:
        names = subprocess.run(["find", "."], cwd=root, capture_output=True, check=True).stdout
        subprocess.run(["cpio", "--quiet", "-o", "-H", "newc"], cwd=root, input=names, stdout=file, check=True)
    return image


def disk(path, script):
    """An ext4 image with the programs, their libraries and the script."""
    root = f"{path}.d"
    for name in ("bin", "sbin", "lib/swift", "lib64", "proc", "sys", "dev", "tmp", "etc"):
        os.makedirs(f"{root}/{name}", exist_ok=True)
    shutil.copy(shutil.which("busybox") or "/bin/busybox", f"{root}/bin/busybox")
    for name in ("mount", "sh"):
        os.symlink("busybox", f"{root}/bin/{name}")
    run("strip", "-o", f"{root}/bin/farcopy", FARCOPY)
    programs = [f"{root}/bin/farcopy"]
    for name in PROGRAMS:
        source = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin")
        assert source, f"{name} is not installed"
        shutil.copy(source, f"{root}/bin/{name}")
        programs.append(f"{root}/bin/{name}")
    for program in programs:
        for line in run("ldd", program, env={**os.environ, "LD_LIBRARY_PATH": swift_libraries()}).stdout.splitlines():
            library = re.search(r"(/\S+)", line)
            if library:
                place = "lib64" if "ld-linux" in library[1] else "lib/swift"
                shutil.copy(library[1], f"{root}/{place}")
    with open(f"{root}/test.sh", "w") as file:
        file.write(PRELUDE + script)
    size = sum(os.path.getsize(os.path.join(place, name)) for place, _, names in os.walk(root) for name in names
               if stat.S_ISREG(os.lstat(os.path.join(place, name)).st_mode))
    run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", root, path, f"{size // 1024 + 32768}k")
    shutil.rmtree(root)


def swift_libraries():
    info = run("swift", "-print-target-info").stdout
    return re.search(r'"runtimeLibraryPaths"\s*:\s*\[\s*"([^"]+)"', info)[1]


class Guest:
    """A running machine; `lines` is what it said."""

    def __init__(self, directory, script, hosts=None):
        """`hosts`: what to do for each word of a line "HOST word"."""
        self.hosts = hosts or {}
        self.lines = []
        image = initramfs(os.path.join(directory, "initramfs"))
        disk(os.path.join(directory, "disk.img"), script)
        self.process = subprocess.Popen(
            ["qemu-system-x86_64", "-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1536",
             "-nographic", "-no-reboot", "-kernel", image, "-initrd", os.path.join(directory, "initramfs"),
             "-append", "console=ttyS0 quiet panic=-1", "-nic", "user,model=virtio-net-pci",
             "-drive", f"file={directory}/disk.img,format=raw,if=virtio,readonly=on"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, errors="replace", preexec_fn=die_with_parent)

    def run(self, seconds):
        """Until the guest ends; returns whether its script succeeded."""
        timer = threading.Timer(seconds, self.process.kill)
        timer.start()
        try:
            for line in self.process.stdout:
                line = line.strip()
                self.lines.append(line)
                if os.environ.get("FARCOPY_KERNEL_VERBOSE"):
                    print(line, flush=True)
                if line.startswith("HOST "):
                    self.hosts[line.split()[1]]()
                    self.process.stdin.write("done\n")
                    self.process.stdin.flush()
            self.process.wait()
        finally:
            timer.cancel()
        return any(line == "GUEST ended with 0" for line in self.lines)

    def end(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
