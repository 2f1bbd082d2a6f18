"""The kernel's own NBD client: file systems on /dev/nbdX, with nbd-client and with `farcopy attach`."""

import faulthandler
import os
import shutil
import socket
import time

from guest import Guest
from sites import SiteTest

FIO = ("fio --name=verify --directory=$1 --rw=randwrite --bsrange=4k-64k --size=24M --ioengine=libaio --direct=1 "
       "--iodepth=16 --verify=crc32c --verify_fatal=1 --verify_state_save=0 --output=/tmp/fio.$2")

CLIENT = """
nbd-client -C 4 -N disk 10.0.2.2 PORT /dev/nbd0 || fail connect
check() { %s || { busybox cat /tmp/fio.$2; fail fio on $2; }; }
mkfs.ext4 -q /dev/nbd0 || fail mkfs.ext4
mount -t ext4 /dev/nbd0 /tmp/a || fail mount ext4
check /tmp/a ext4
fstrim -v /tmp/a || fail fstrim ext4
umount /tmp/a || fail umount
e2fsck -fn /dev/nbd0 || fail e2fsck
mkfs.xfs -q -f /dev/nbd0 || fail mkfs.xfs
mount -t xfs /dev/nbd0 /tmp/a || fail mount xfs
check /tmp/a xfs
fstrim -v /tmp/a || fail fstrim xfs
umount /tmp/a || fail umount
xfs_repair -n /dev/nbd0 >/dev/null 2>&1 || fail xfs_repair
nbd-client -d /dev/nbd0 || fail disconnect
dmesg | busybox grep -E "I/O error|Unexpected reply|Double reply" && fail the kernel complains
exit 0
""" % FIO

ATTACH = """
U=nbd://10.0.2.2:PORT
farcopy attach $U/nothing /dev/nbd0 --timeout 3 && fail an unknown export was attached
farcopy attach $U/disk /dev/nbd0 --timeout 3 || fail attach disk
farcopy attach $U/other /dev/nbd1 --timeout 3 || fail attach other
farcopy attach $U/other /dev/nbd0 --timeout 3 && fail a device was attached twice
mkfs.ext4 -q /dev/nbd0 && mkfs.xfs -q -f /dev/nbd1 || fail mkfs
mount -t ext4 /dev/nbd0 /tmp/a && mount -t xfs /dev/nbd1 /tmp/b || fail mount
farcopy detach /dev/nbd0 && fail a mounted device was detached
load() { %s --time_based --runtime=25 --rate_iops=150; }
for round in killed upgraded; do
    load /tmp/a ext4-$round & first=$!
    load /tmp/b xfs-$round & second=$!
    sleep 6
    host $round
    wait $first || { busybox cat /tmp/fio.ext4-$round; fail ext4 did not live through the server being $round; }
    wait $second || { busybox cat /tmp/fio.xfs-$round; fail xfs did not live through the server being $round; }
done
umount /tmp/a && umount /tmp/b || fail umount
e2fsck -fn /dev/nbd0 || fail e2fsck
xfs_repair -n /dev/nbd1 >/dev/null 2>&1 || fail xfs_repair
farcopy detach /dev/nbd0 && farcopy detach /dev/nbd1 || fail detach
farcopy detach /dev/nbd0 && fail detached twice
for try in 1 2 3 4 5; do busybox pidof farcopy >/dev/null || break; sleep 1; done
busybox pidof farcopy && fail a keeper stays behind
dmesg | busybox grep -E "I/O error|Unexpected reply|Double reply|corrupt|shut ?down" && fail the kernel complains
exit 0
""" % FIO

RESTORE = """
U=nbd://10.0.2.2:PORT
farcopy attach $U/disk /dev/nbd0 --timeout 3 || fail attach
mkfs.ext4 -q /dev/nbd0 || fail mkfs
mount -t ext4 /dev/nbd0 /tmp/a || fail mount
echo before >/tmp/a/file && busybox sync || fail write
umount /tmp/a || fail umount
host copied
mount -t ext4 /dev/nbd0 /tmp/a || fail mount again
echo after >/tmp/a/file && busybox sync && echo cached >/tmp/a/other || fail write again
host restored
busybox sync
for try in 1 2 3 4 5 6 7 8 9 10; do busybox pidof farcopy >/dev/null || break; sleep 1; done
busybox pidof farcopy && fail the device is kept
umount /tmp/a
farcopy attach $U/disk /dev/nbd1 --timeout 3 || fail attach anew
e2fsck -fn /dev/nbd1 || fail e2fsck: stale caches were written over what was restored
mount -t ext4 /dev/nbd1 /tmp/b || fail mount anew
[ "$(busybox cat /tmp/b/file)" = before ] || fail it is not what was restored
echo new >/tmp/b/file && busybox sync || fail write anew
umount /tmp/b && farcopy detach /dev/nbd1 || fail detach
exit 0
"""


class Kernel(SiteTest):
    seconds = 600

    def serve(self):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        return self.site("solo", {"disk": "512MiB", "other": "512MiB"}, nbd_listen=[f"127.0.0.1:{self.port}"])

    def guest(self, script, hosts=None):
        faulthandler.cancel_dump_traceback_later()
        guest = Guest(self.directory, script.replace("PORT", str(self.port)), hosts)
        self.addCleanup(guest.end)
        succeeded = guest.run(self.seconds)
        self.assertTrue(succeeded, "the guest said:\n" + "\n".join(guest.lines[-60:]))
        return guest

    def test_file_systems_over_four_connections(self):
        self.serve()
        guest = self.guest(CLIENT)
        self.assertIn("trimmed", "\n".join(guest.lines))

    def test_attached_file_systems_live_through_a_crash_and_an_upgrade(self):
        site = self.serve()

        def killed():
            site.kill()
            time.sleep(10)
            site.start()

        def upgraded():
            # Another file, another process, a clean stop: what a package upgrade does.
            program = os.path.join(self.directory, "farcopy-upgraded")
            shutil.copy(os.environ.get("FARCOPY", site.program), program)
            site.stop()
            site.program = program
            time.sleep(2)
            site.start()
        self.guest(ATTACH, {"killed": killed, "upgraded": upgraded})

    def test_a_mounted_file_system_does_not_write_over_what_was_restored(self):
        site = self.serve()
        refused = []

        def copied():
            site.farcopy("flashcopy", "create", "disk", "good")

        def restored():
            refused.append(site.farcopy("flashcopy", "restore", "disk", "good", check=False))
            site.farcopy("flashcopy", "restore", "disk", "good", "--yes")
        self.guest(RESTORE, {"copied": copied, "restored": restored})
        self.assertIn("open for writing over 4 connections (4 from 127.0.0.1)", refused[0].stderr)
