"""Holds the rules of `Sources/Groups` ("Must be prevented", at the head of a file) against `Groups.rules`: each has a deliberate fault of the
simulator or a mutant that the simulator catches, and nothing there is without its rule."""

import glob
import os
import re

FAULTS = "Sources/Simulation/DeliberateFault.swift"


def written(root):
    """(file, rule) of every rule at the head of a file; a rule's further lines are indented once more."""
    found = []
    for path in sorted(glob.glob(os.path.join(root, "Sources/Groups/**/*.swift"), recursive=True)):
        name = os.path.relpath(path, root)
        with open(path, encoding="utf-8") as file:
            head = file.read().split("Must be prevented:", 1)
        if len(head) < 2:
            continue
        rules = []
        for number, line in enumerate(head[1].splitlines()):
            if match := re.match(r"//     (\S.*)", line):
                rules[-1] += " " + match[1]
            elif match := re.match(r"//   (\S.*)" if number else r" (\S.*)", line):
                rules.append(match[1])
            elif number:
                break
        found += [(name, rule) for rule in rules]
    return found


def listed(path):
    """(file, beginning of the rule, [(word, rest)]) each."""
    entries, file_name = [], None
    with open(path, encoding="utf-8") as file:
        for line in file.read().splitlines():
            word, _, rest = line.partition(" ")
            if word == "file":
                file_name = rest
            elif word == "rule":
                entries.append((file_name, rest, []))
            elif word in ("fault", "mutant", "held"):
                entries[-1][2].append((word, rest))
            elif line.strip() and word != "#":
                raise ValueError(f"{path}: '{word}' is none of file, rule, fault, mutant, held")
    return entries


def broken_by_mutants(path):
    """Names of mutants that the simulator must catch."""
    return {name for _, _, proofs in listed(path) for word, name in proofs if word == "mutant"}


def problems(root, path, mutants):
    """What the list lacks, or says in vain, in words."""
    entries, rules = listed(path), written(root)
    with open(os.path.join(root, FAULTS), encoding="utf-8") as file:
        faults = set(re.findall(r"\w+", " ".join(re.findall(r"^    case ([\w, ]+)$", file.read(), re.M))))
    simulated = {mutant.name for mutant in mutants if "simulate" in mutant.layers}
    for name, rule in rules:
        if not any(name == place and rule.startswith(text) for place, text, _ in entries):
            yield f"{name}: no deliberate fault and no mutant for '{rule}'"
    for name, text, proofs in entries:
        if not any(name == place and rule.startswith(text) for place, rule in rules):
            yield f"{name} has no rule '{text}'"
        if not proofs:
            yield f"{name}: '{text}' has neither a fault nor a mutant"
        for word, rest in proofs:
            if word == "fault":
                yield from (f"{name}: there is no fault '{one}'" for one in rest.split() if one not in faults)
            elif word == "mutant" and rest not in simulated:
                yield f"{name}: there is no mutant '{rest}' with a run of simulate"
