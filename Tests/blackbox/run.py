"""Runs every black-box test, or those named on the command line, and closes with a count.

Each file is a process of its own; two run at a time (JOBS), the longest first, since most of them wait for something most of the time.
What a file printed is shown when it has ended. `split test_x` runs each test of a file by itself instead; `kernel` names the tests
in a small machine; `devices` runs the suites that use volumes with block devices in the place of files, once with sectors of 512 and
once of 4,096 bytes.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
import unittest

ON_DEVICES = (
    "test_protocol", "test_structured", "test_direct", "test_flashcopy", "test_flashcopy_service", "test_replication", "test_roles",
    "test_link", "test_operations", "test_closed_cut")
LONGEST_FIRST = (
    "test_power", "test_closed_cut", "test_several_hosts", "test_several_roles", "test_elections", "test_full", "test_nth_call", "test_sequences", "test_link", "test_replication", "test_operations")
ALONE = ("test_allocations",)  # counts what happens in so many seconds
here = os.path.dirname(os.path.abspath(__file__))
kernel = os.path.join(os.path.dirname(here), "kernel")
sys.path.insert(0, here)
from sites import die_with_parent  # noqa: E402


def here_and_now(names):
    """Runs tests in this process: (how many passed, failed, were skipped)."""
    if names == ["kernel"]:
        sys.path.insert(0, kernel)
        suite = unittest.TestLoader().discover(kernel)
    else:
        suite = unittest.TestLoader().loadTestsFromNames(names)
    result = unittest.TextTestRunner(verbosity=2).run(suite)
    failed = len({getattr(case, "test_case", case) for case, _ in result.failures + result.errors})  # parts of one count once
    return result.testsRun - failed - len(result.skipped), failed, len(result.skipped)


class File:
    """A file of tests, or one test, that runs in a process of its own."""

    def __init__(self, name):
        self.name = name
        self.began = time.monotonic()
        self.output = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, __file__, name], env={**os.environ, "JOBS": "0"}, stdout=self.output, stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent)

    def ended(self):
        return self.process.poll() is not None

    def counts(self):
        """Shows what it printed: (how many passed, failed, were skipped). A process that ended otherwise is a failure."""
        self.output.seek(0)
        printed = self.output.read().decode(errors="replace")
        found = re.search(r"^(\d+) passed, (\d+) failed, (\d+) skipped$", printed, re.MULTILINE)
        counts = [int(number) for number in found.groups()] if found else [0, 0, 0]
        if self.process.returncode != 0 and counts[1] == 0:
            counts[1] = 1
        print(f"\n== {self.name}: {time.monotonic() - self.began:.0f} s, ended with {self.process.returncode}\n{printed}", flush=True)
        return counts


def side_by_side(names, jobs):
    """Runs files of tests, so many at a time: (how many passed, failed, were skipped)."""
    waiting = sorted(names, key=lambda name: LONGEST_FIRST.index(name) if name in LONGEST_FIRST else len(LONGEST_FIRST))
    waiting = [name for name in waiting if name not in ALONE] + [name for name in waiting if name in ALONE]
    running, total = [], [0, 0, 0]
    try:
        while waiting or running:
            while waiting and len(running) < jobs and not (waiting[0] in ALONE and running):
                running.append(File(waiting.pop(0)))
            for file in [file for file in running if file.ended()]:
                running.remove(file)
                total = [sum(pair) for pair in zip(total, file.counts())]
            time.sleep(0.05)
    finally:
        for file in running:
            file.process.terminate()
    return total


def main():
    names, jobs = sys.argv[1:], int(os.environ.get("JOBS", 2))
    if names[:1] == ["devices"]:
        ended = []
        for sector in ("512", "4096"):
            print(f"volumes are block devices with sectors of {sector} bytes", flush=True)
            ended.append(subprocess.run(
                [sys.executable, __file__, *(names[1:] or ON_DEVICES)], env={**os.environ, "FARCOPY_DEVICES": sector}).returncode)
        return max(ended)
    if names[:1] == ["split"]:
        names = [test.id() for suite in unittest.TestLoader().loadTestsFromNames(names[1:]) for case in suite for test in case]
    if not names:
        names = sorted(name[:-3] for name in os.listdir(here) if name.startswith("test_") and name.endswith(".py"))
    passed, failed, skipped = here_and_now(names) if jobs == 0 or len(names) == 1 else side_by_side(names, jobs)
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 0 if passed + failed + skipped > 0 and failed == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
