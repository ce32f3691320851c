"""Adds the energy head's lines to an openvla-oft checkout, looks whether they fit, or takes them out again."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from vla_energy.hosts import patching
from vla_energy.hosts.patch_file import Patch, PatchError, load_patch

_MEANING = {
    patching.EXACT: "exact: the version that the patch was made for",
    patching.DIVERGED: "diverged, but every anchor was found",
    patching.APPLIED: "already applied",
    patching.ABSENT: "not there",
}

EXAMPLE = """examples:
  vla-energy patch check ~/openvla-oft     would it fit? changes nothing
  vla-energy patch apply ~/openvla-oft"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("action", choices=["apply", "check", "revert"], help="check changes nothing on disk")
    parser.add_argument("path", metavar="PATH", help="the checkout")
    parser.add_argument("--patch", metavar="FILE", help="patch file (default: the one in the package)")
    parser.add_argument(
        "--only", metavar="FILE", action="append", help="of the patch's files only this; may be repeated"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the command; `check` returns 1 where applying would not work.

    Raises:
        PatchError: there is no folder at PATH, or else why the lines cannot be added or taken out.
    """
    if not Path(args.path).is_dir():
        raise PatchError(f"{args.path} is not a folder; name an openvla-oft checkout")
    patch = load_patch(args.patch)
    if args.only:
        patch = patch.only(args.only)
    return {"apply": _apply, "check": _check, "revert": _revert}[args.action](args, patch)


def _check(args: argparse.Namespace, patch: Patch) -> int:
    try:
        report = patching.check(args.path, patch)
    except PatchError as error:
        if args.json:
            print(
                json.dumps(
                    {"root": args.path, "patch": patch.name, "ok": False, "problem": str(error), "files": []}, indent=1
                )
            )
        print("error:", error, file=sys.stderr)
        return 1
    _print_report(report, patch, args.json)
    if not args.json:
        advice = "it is applied" if report.applied else "vla-energy patch apply would work" if report.ok else ""
        print(advice or "vla-energy patch apply would refuse: " + (report.problem or "see above"))
    return 0 if report.ok else 1


def _apply(args: argparse.Namespace, patch: Patch) -> int:
    before = patching.apply(args.path, patch)
    _print_report(patching.check(args.path, patch) if args.json else before, patch, args.json)
    if not args.json:
        print("already applied; nothing was changed" if before.applied else f"applied {patch.name}")
    return 0


def _revert(args: argparse.Namespace, patch: Patch) -> int:
    reverted = patching.revert(args.path, patch)
    if args.json:
        print(json.dumps({"root": args.path, "patch": patch.name, "reverted": reverted}, indent=1))
    else:
        print("\n".join(f"{path}: the added lines are out" for path in reverted) or "not applied; nothing was changed")
    return 0


def _print_report(report: patching.Report, patch: Patch, as_json: bool) -> None:
    if as_json:
        data = {**dataclasses.asdict(report), "ok": report.ok, "applied": report.applied}
        print(json.dumps(data, indent=1))
        return
    commit = f", commit {report.commit[:8]}" if report.commit else ""
    print(f"{patch.name} (for {patch.host} {patch.commit[:8]}) on {Path(report.root)}{commit}")
    for file, wanted in zip(report.files, patch.files, strict=True):
        print(f"{file.path}: {_MEANING.get(file.state) if file.ok else file.problem}")
        if file.state not in _MEANING or not file.lines:
            continue
        for line, insertion in zip(file.lines, wanted.insertions, strict=True):
            where = f"line {line}" if file.state == patching.APPLIED else f"after line {line}"
            print(f"  {where} ({insertion.anchor}): {insertion.text}")
