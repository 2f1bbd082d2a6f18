"""Runs every black-box test, or those named on the command line, and closes with a count.

`kernel` names the tests in a small machine; `devices` runs the suites that use volumes with block devices in the place of files, once
with sectors of 512 and once of 4,096 bytes.
"""

import os
import subprocess
import sys
import unittest

ON_DEVICES = (
    "test_protocol", "test_structured", "test_direct", "test_flashcopy", "test_flashcopy_service", "test_replication", "test_roles",
    "test_link", "test_operations", "test_closed_cut")
here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, here)
if sys.argv[1:2] == ["devices"]:
    ended = []
    for sector in ("512", "4096"):
        print(f"volumes are block devices with sectors of {sector} bytes", flush=True)
        ended.append(subprocess.run(
            [sys.executable, __file__, *(sys.argv[2:] or ON_DEVICES)], env={**os.environ, "FARCOPY_DEVICES": sector}).returncode)
    sys.exit(max(ended))
loader = unittest.TestLoader()
kernel = os.path.join(os.path.dirname(here), "kernel")
if sys.argv[1:] == ["kernel"]:
    sys.path.insert(0, kernel)
    suite = loader.discover(kernel)
else:
    suite = loader.loadTestsFromNames(sys.argv[1:]) if sys.argv[1:] else loader.discover(here)
result = unittest.TextTestRunner(verbosity=2).run(suite)
failed = len({getattr(case, "test_case", case) for case, _ in result.failures + result.errors})  # parts of one count once
print(f"{result.testsRun - failed - len(result.skipped)} passed, {failed} failed, {len(result.skipped)} skipped")
sys.exit(0 if result.testsRun > 0 and failed == 0 else 1)
