"""Runs every black-box test, or those named on the command line, and closes with a count."""

import os
import sys
import unittest

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, here)
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
