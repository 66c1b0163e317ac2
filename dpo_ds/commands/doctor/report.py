"""Says what the checks found: a line each for the terminal, JSON for scripts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace

PASS, WARN, FAIL = "pass", "warn", "fail"
COLOURS = {PASS: "32", WARN: "33", FAIL: "31"}


@dataclass(frozen=True)
class Finding:
    """Tells what one check saw. remedy: what to do, "" where all is well. figures: the numbers behind it, for JSON."""

    check: str
    verdict: str
    text: str
    remedy: str = ""
    figures: dict = field(default_factory=dict)

    def line(self, colours: bool) -> str:
        verdict = f"\033[{COLOURS[self.verdict]}m{self.verdict}\033[0m" if colours else self.verdict
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{verdict}  {self.check:<13}{self.text}{remedy}"


def softened(findings: Iterable[Finding], lenient: Iterable[str]) -> list[Finding]:
    """Makes warnings of the failures of these checks."""
    names = set(lenient)
    return [
        replace(finding, verdict=WARN) if finding.verdict == FAIL and finding.check in names else finding
        for finding in findings
    ]


def summary(findings: list[Finding], seconds: float) -> str:
    counts = {verdict: sum(finding.verdict == verdict for finding in findings) for verdict in COLOURS}
    what = f"{counts[PASS]} passed, {counts[WARN]} warned, {counts[FAIL]} failed"
    return f"{what}, in {seconds:.0f} s"


def as_json(findings: list[Finding], command: str, ranks: int, seconds: float) -> str:
    """One object: failed (bool), command, ranks, seconds, and findings with check, verdict, text, remedy, figures."""
    failed = any(finding.verdict == FAIL for finding in findings)
    found = {"failed": failed, "command": command, "ranks": ranks, "seconds": round(seconds, 1)}
    return json.dumps(found | {"findings": [asdict(finding) for finding in findings]}, ensure_ascii=False)
