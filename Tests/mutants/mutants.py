"""Changes one line of a rule at a time and sees whether some test notices: `make mutants [MUTANT=name] [FOLDER=name] [RULES=1] [CHECK=1]`.

The mutants are data, in the files beside this one:

    # what the rule is for
    mutant name
    file Sources/Volumes/Point.swift
    - the snippet, which occurs once in the file
    + what stands in its place; MUTANT is true in the run of this mutant
    unit the regular expression of `swift test --filter`
    simulate arguments of `simulate`
    blackbox names for Tests/blackbox/run.py
    survives why nothing can notice it

Snippets of several lines have a `-` or `+` before each; white space counts. A copy of the package in `.build-mutants/tree` is built once
with all of them, each behind a switch, which `FARCOPY_MUTANT=name` in the environment turns on. First everything that is named must pass
without; then each mutant meets its layers, cheap ones first, until one fails or hangs. Those that stand for a rule of `Sources/Groups`
(`Groups.rules`) must be caught by each of their layers, the simulator among them; `RULES=1` tries these alone. Ends with 1 when fewer than
90 % are caught, or one that survives is not explained.
`CHECK=1` only looks whether every snippet is where the list says, and every rule has its fault or mutant.
"""

import glob
import os
import re
import signal
import subprocess
import sys
import time

import rules

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
LIST = os.path.dirname(os.path.abspath(__file__))
RULES = os.path.join(LIST, "Groups.rules")
TREE = os.path.join(ROOT, ".build-mutants", "tree")
SWIFT = os.environ.get("SWIFT", "swift")
# In this order; and after how many seconds a run counts as hanging.
LAYERS = {"unit": 60, "simulate": 300, "blackbox": 240}
LEAST = 0.9

SWITCH = """// Mutant.swift: made by Tests/mutants; in this copy only.

import Glibc

private let names: [String: Int] = [{names}]
private let active = getenv("FARCOPY_MUTANT").flatMap {{ names[String(cString: $0)] }} ?? 0

@inline(__always)
func isMutant(_ number: Int) -> Bool {{ active == number }}
"""


class Mutant:
    def __init__(self, name, place):
        self.name, self.place = name, place
        self.file, self.old, self.new, self.survives = None, [], [], None
        self.layers = {}
        self.number = 0

    @property
    def folder(self):
        return self.file.split("/")[1]

    def runs(self):
        """(layer, arguments) of each run, cheap ones first."""
        return [(layer, words) for layer in LAYERS for words in self.layers.get(layer, ())]


def fail(text):
    print(f"mutants: {text}", file=sys.stderr)
    sys.exit(2)


def read_list():
    mutants = []
    for path in sorted(glob.glob(os.path.join(LIST, "*.txt"))):
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file.read().splitlines(), 1):
                word, _, rest = line.partition(" ")
                if not line.strip() or word == "#":
                    continue
                place = f"{os.path.relpath(path, ROOT)}:{number}"
                if word == "mutant":
                    mutants.append(Mutant(rest, place))
                elif not mutants:
                    fail(f"{place}: a mutant begins with its name")
                elif word == "file":
                    mutants[-1].file = rest
                elif word == "-":
                    mutants[-1].old.append(rest)
                elif word == "+":
                    mutants[-1].new.append(rest)
                elif word == "survives":
                    mutants[-1].survives = rest
                elif word in LAYERS:
                    mutants[-1].layers.setdefault(word, []).append(rest)
                else:
                    fail(f"{place}: '{word}' is none of mutant, file, -, +, unit, simulate, blackbox, survives")
    names = [mutant.name for mutant in mutants]
    for number, mutant in enumerate(mutants, 1):
        mutant.number = number
        what = f"{mutant.place}: mutant '{mutant.name}'"
        if names.count(mutant.name) > 1:
            fail(f"{what} is there twice")
        if not mutant.file or not mutant.old or "MUTANT" not in "\n".join(mutant.new):
            fail(f"{what} needs a file, a snippet, and MUTANT in what takes its place")
        if not mutant.layers and not mutant.survives:
            fail(f"{what} needs a layer that catches it, or a reason why none can")
    return mutants


def mutated(path, text, mutants):
    """The file's text with all of its mutants."""
    places = []
    for mutant in mutants:
        old = "\n".join(mutant.old)
        count = text.count(old)
        if count != 1:
            fail(f"{mutant.place}: the snippet of mutant '{mutant.name}' is in {path} {count} times, not once")
        start = text.index(old)
        places.append((start, start + len(old), mutant))
    places.sort(key=lambda place: place[0])
    for (_, end, one), (start, _, other) in zip(places, places[1:]):
        if start < end:
            fail(f"the snippets of '{one.name}' and '{other.name}' overlap; take smaller ones")
    for start, end, mutant in reversed(places):
        new = re.sub(r"\bMUTANT\b", f"isMutant({mutant.number})", "\n".join(mutant.new))
        text = text[:start] + new + text[end:]
    return text


def tree(mutants):
    """What the copy of the package consists of: path -> bytes."""
    found = {}
    for name in ("Package.swift", "Package.resolved"):
        if os.path.exists(os.path.join(ROOT, name)):
            with open(os.path.join(ROOT, name), "rb") as file:
                found[name] = file.read()
    for top in ("Sources", "Tests"):
        for directory, _, names in os.walk(os.path.join(ROOT, top)):
            for name in names:
                path = os.path.relpath(os.path.join(directory, name), ROOT)
                if "__pycache__" not in path:
                    with open(os.path.join(ROOT, path), "rb") as file:
                        found[path] = file.read()
    by_file = {}
    for mutant in mutants:
        by_file.setdefault(mutant.file, []).append(mutant)
    for path, here in by_file.items():
        if path not in found:
            fail(f"{here[0].place}: there is no file {path}")
        found[path] = mutated(path, found[path].decode(), here).encode()
    for folder in {mutant.folder for mutant in mutants}:
        names = ", ".join(f'"{mutant.name}": {mutant.number}' for mutant in mutants if mutant.folder == folder)
        found[f"Sources/{folder}/Mutant.swift"] = SWITCH.format(names=names).encode()
    return found


def write_tree(files):
    """Brings the copy up to date, without touching what is the same, so that little is built again."""
    for top in ("Sources", "Tests"):
        for directory, _, names in os.walk(os.path.join(TREE, top)):
            for name in names:
                path = os.path.join(directory, name)
                if os.path.relpath(path, TREE) not in files:
                    os.unlink(path)
    for path, data in files.items():
        path = os.path.join(TREE, path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if os.path.exists(path):
            with open(path, "rb") as file:
                if file.read() == data:
                    continue
        with open(path, "wb") as file:
            file.write(data)


def build():
    print("building the copy with all mutants", flush=True)
    for product in (["--product", "farcopy"], ["--product", "simulate"], ["--build-tests"]):
        if subprocess.run([SWIFT, "build", "-c", "release", "--quiet", *product], cwd=TREE).returncode != 0:
            fail(f"the copy in {os.path.relpath(TREE, ROOT)} cannot be built; its errors name the mutants' lines")


def command(layer, words):
    if layer == "unit":  # what `swift test` starts, which needs seconds for itself
        bundle = os.path.join(TREE, ".build/release/farcopyPackageTests.xctest")
        return [bundle, "--testing-library", "swift-testing", "--filter", words], TREE
    if layer == "simulate":
        return [os.path.join(TREE, ".build/release/simulate"), *words.split()], TREE
    return [sys.executable, "run.py", *words.split()], os.path.join(TREE, "Tests/blackbox")


def run(layer, words, mutant=None, limit=None):
    """(passed, seconds, output); whoever hangs is ended with all that it has started, and has not passed."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "SWIFT_BACKTRACE": "enable=no"}
    environment.pop("FARCOPY", None)
    if mutant:
        environment["FARCOPY_MUTANT"] = mutant.name
    arguments, directory = command(layer, words)
    start = time.monotonic()
    process = subprocess.Popen(
        arguments, cwd=directory, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True)
    try:
        output = process.communicate(timeout=limit or LAYERS[layer])[0]
        passed = process.returncode == 0
    except subprocess.TimeoutExpired:
        passed, output = False, "it hangs"
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
    return passed, time.monotonic() - start, output


def baseline(mutants):
    """Everything that is named passes without a mutant, and is there."""
    runs = sorted({run for mutant in mutants for run in mutant.runs()}, key=lambda run: (list(LAYERS).index(run[0]), run[1]))
    print(f"{len(runs)} runs without a mutant", flush=True)
    bad = []
    for layer, words in runs:
        passed, seconds, output = run(layer, words)
        if passed and layer == "unit" and not re.search(r"Test run with [1-9]\d* test", output):
            passed, output = False, "no test has this name"
        if not passed:
            print(f"  FAILS {layer} {words} ({seconds:.0f} s)\n    " + "\n    ".join(output.splitlines()[-15:]), flush=True)
            bad.append((layer, words))
    return bad


def try_mutant(mutant, by_all):
    """What caught it, or None.

    by_all: each of its runs must, and not only one.
    """
    catches = []
    for layer, words in mutant.runs():
        passed, seconds, _ = run(layer, words, mutant)
        if not passed:
            catches.append(f"{layer} {words} ({seconds:.0f} s)")
        if passed == by_all:
            break
    return " and ".join(catches) if catches and not (by_all and passed) else None


def report(mutants, caught):
    print(f"\n{'folder':<14}{'mutants':>8}{'caught':>8}{'survive':>9}{'of them explained':>19}")
    for folder in sorted({mutant.folder for mutant in mutants}) + [None]:
        here = [mutant for mutant in mutants if folder in (mutant.folder, None)]
        alive = [mutant for mutant in here if not caught[mutant.name]]
        explained = sum(mutant.survives is not None for mutant in alive)
        print(f"{folder or 'all':<14}{len(here):>8}{len(here) - len(alive):>8}{len(alive):>9}{explained:>19}")
    share = sum(bool(caught[mutant.name]) for mutant in mutants) / len(mutants)
    print(f"{100 * share:.1f} % are caught")
    unexplained = [mutant for mutant in mutants if not caught[mutant.name] and mutant.survives is None]
    for mutant in unexplained:
        print(f"not explained: {mutant.name} ({mutant.place})")
    return share >= LEAST and not unexplained


def main():
    everything = read_list()
    files = tree(everything)
    for_rules = rules.broken_by_mutants(RULES)
    name, folder = os.environ.get("MUTANT"), os.environ.get("FOLDER")
    mutants = [
        mutant for mutant in everything
        if (not name or mutant.name == name) and (not folder or mutant.folder == folder)
        and (not os.environ.get("RULES") or mutant.name in for_rules)]
    if not mutants:
        fail(f"no mutant is called '{name}'" if name else f"no mutant lies in '{folder}'")
    missing = list(rules.problems(ROOT, RULES, everything))
    if missing:
        fail("\n".join(missing))
    if os.environ.get("CHECK"):
        print(f"{len(mutants)} mutants; every snippet is where the list says")
        return 0
    write_tree(files)
    build()
    if bad := baseline(mutants):
        fail(f"{len(bad)} runs fail without a mutant; what they say about mutants is nothing")
    caught = {}
    width = max(len(mutant.name) for mutant in mutants)
    for mutant in mutants:
        caught[mutant.name] = try_mutant(mutant, mutant.name in for_rules)
        text = f"caught by {caught[mutant.name]}" if caught[mutant.name] else f"SURVIVES: {mutant.survives or 'not explained'}"
        stale = ", although the list says that it survives" if caught[mutant.name] and mutant.survives else ""
        print(f"{mutant.folder + ' ' + mutant.name:<{width + 14}}{text}{stale}", flush=True)
    return 0 if report(mutants, caught) else 1


if __name__ == "__main__":
    sys.exit(main())
