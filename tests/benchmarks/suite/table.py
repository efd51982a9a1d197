"""Writes results as a Markdown table for people and as JSON with every raw sample for programs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.benchmarks.suite.machine import ROOT
from tests.benchmarks.suite.race import Lane
from tests.benchmarks.suite.result import RowResult, ratio, value_of


def write(results: Sequence[RowResult], about: Mapping[str, Any], folder: Path, *, name: str) -> tuple[Path, Path]:
    """Writes NAME.md and NAME.json into the folder; returns both."""
    folder.mkdir(parents=True, exist_ok=True)
    markdown, data = folder / f"{name}.md", folder / f"{name}.json"
    markdown.write_text(without_folders(as_markdown(results, about)), encoding="utf-8")
    content = {"about": about, "rows": [asdict(result) for result in results]}
    data.write_text(without_folders(json.dumps(content, indent=1, default=str) + "\n"), encoding="utf-8")
    return markdown, data


def without_folders(text: str) -> str:
    """Returns the text without the folders of this machine, which an error of a contestant may name."""
    for folder in sorted({str(ROOT), sys.prefix, sys.base_prefix, str(Path.home())}, key=len, reverse=True):
        text = text.replace(f"{folder}/", "")
    return text


def as_markdown(results: Sequence[RowResult], about: Mapping[str, Any]) -> str:
    """Returns the page: the machine, then one table per row."""
    versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
    machine = about["machine"]
    lines = [
        "# dtrain and its peers, side by side",
        "",
        f"`{about['command']}`",
        "",
        f"Commit {about['commit']}, {about['date']}. {machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_gb']} GB, {machine['system']}. {versions}.",
        "",
        "One thread per rank, bound to a core; blocks of all contestants interleave. Times are medians; "
        "a ratio is the median over the rounds of contestant / dtrain, so above 1 dtrain is ahead.",
        "",
    ]
    if about.get("warning"):
        lines += [f"**Warning:** {about['warning']}", ""]
    for result in results:
        lines += row_as_markdown(result)
    return "\n".join(lines).rstrip() + "\n"


def row_as_markdown(result: RowResult) -> list[str]:
    """Returns the lines of one row."""
    keys = [key for key, _, _ in result.columns.values()]
    compared = {
        heading: key for heading, key in result.compared.items() if any(key in lane.samples for lane in result.lanes)
    }
    headings = [*result.columns, *compared]
    lines = [f"## {result.name}: {result.title}", "", result.workload, ""]
    lines += ["| contestant | " + " | ".join(headings) + " |", "|---|" + "---:|" * len(headings)]
    for lane in result.lanes:
        if not lane.ran:
            lines.append(f"| {lane.name} | {_one_line(lane.status)} |" + " |" * (len(headings) - 1))
            continue
        cells = [_cell(lane, key, factor, decimals) for key, factor, decimals in result.columns.values()]
        cells += [_ratio(lane, result.reference(lane), key) for key in compared.values()]
        lines.append(f"| {lane.name} | " + " | ".join(cells) + " |")
    lines.append("")
    rounds = max((len(lane.samples.get(key, [])) for lane in result.lanes for key in keys), default=0)
    if rounds:
        lines += [f"{rounds} rounds, {result.seconds:.0f} s.", ""]
    lines += [f"- {'holds' if holds else '**FAILS**'}: {check}" for check, holds in result.checks.items()]
    lines += [f"- {note}" for note in result.notes]
    return [*lines, ""] if result.checks or result.notes else lines


def _cell(lane: Lane, key: str, factor: float, decimals: int) -> str:
    value = value_of(lane, key)
    return "" if value is None else f"{value * factor:,.{decimals}f}"


def _ratio(lane: Lane, own: Lane | None, key: str) -> str:
    found = ratio(lane, own, key) if own is not None else None
    return "" if found is None else f"{found:.2f}"


def _one_line(text: str) -> str:
    """Returns the first line of a status, and the line of what the process printed that names an error, else the last."""
    first, *printed = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in printed if re.match(r"(\[\w+\]:)?[\w.]*(Error|Exception): ", line)]
    shown = ": ".join([first, *(errors or printed)[-1:]])
    return shown.replace("|", "\\|")
