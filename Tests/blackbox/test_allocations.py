"""The steady-state data path allocates nothing: counted inside the reactors between two moments of a long run."""

import os
import struct
import time

import nbd

from sites import ROOT, SiteTest, run

MIB = 1 << 20


class Allocations(SiteTest):
    def setUp(self):
        super().setUp()
        library = os.path.join(self.directory, "allocations.so")
        run("clang", "-O2", "-shared", "-fPIC", "-o", library, os.path.join(ROOT, "Tests/blackbox/allocations.c"))
        self.counts = os.path.join(self.directory, "counts")
        with open(self.counts, "wb") as file:
            file.truncate(4096)
        self.environment = {**os.environ, "LD_PRELOAD": library, "FARCOPY_ALLOCATIONS": self.counts}

    def serve(self):
        site = self.site("solo", {"disk": "64MiB", "other": "64MiB"}, start=False)
        site.environment = self.environment
        return site.start()

    def count(self):
        with open(self.counts, "rb") as file:
            return struct.unpack("<QQ", file.read(16))

    def measured(self, uri, mode, *options):
        """What was allocated and freed between the second and the fourth second of a fio run."""
        load = self.spawn(
            "fio", "--thread", "--name=load", "--ioengine=nbd", f"--uri={uri}", f"--rw={mode}", "--size=60M", "--time_based",
            "--runtime=6", "--output=/dev/null", *options)
        time.sleep(2)
        before = self.count()
        time.sleep(2)
        after = self.count()
        self.assertEqual(load.wait(30), 0)
        return tuple(b - a for a, b in zip(before, after))

    def test_the_counter_counts(self):
        site = self.serve()
        before = self.count()
        site.connect("disk").shutdown()
        self.assertGreater(self.count()[0], before[0], "a connection takes memory")

    def test_reads_writes_zeroes_and_flushes_of_a_steady_client(self):
        site = self.serve()
        handle = site.connect("disk")
        for at in range(0, 64 * MIB, 4 * MIB):
            handle.pwrite(os.urandom(4 * MIB), at)
        for mode, options in (("randrw", ("--bsrange=512-128k", "--iodepth=32", "--fsync=100")),
                              ("randread", ("--bs=4k", "--iodepth=1")), ("randtrim", ("--bs=64k", "--iodepth=8"))):
            self.assertEqual(self.measured(site.uri("disk"), mode, *options), (0, 0), mode)

    def test_writes_under_a_flashcopy(self):
        site = self.serve()
        handle = site.connect("disk")
        for at in range(0, 64 * MIB, 4 * MIB):
            handle.pwrite(os.urandom(4 * MIB), at)
        site.farcopy("flashcopy", "create", "disk", "copy")
        self.assertEqual(self.measured(site.uri("disk"), "randwrite", "--bs=4k", "--iodepth=16", "--rate_iops=500"), (0, 0))
