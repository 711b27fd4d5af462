"""The report of ``hpo-plugin check``, as a table, plain text, or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: Name of the check.
        found: Result of the check.
        ok: Whether the check passed.
        remedy: What to do; empty if there is nothing to do.
    """

    name: str
    found: str
    ok: bool = True
    remedy: str = ""


@dataclass
class CheckReport:
    """The findings of all checks.

    Attributes:
        findings: The findings, in the order of the report.
        seconds: Wall time of the checks, in seconds.
    """

    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether all checks passed."""
        return all(finding.ok for finding in self.findings)

    @property
    def summary(self) -> str:
        """The last line of the report."""
        failed = sum(not finding.ok for finding in self.findings)
        verdict = f"{failed} of {len(self.findings)} checks failed" if failed else "all checks passed"
        return f"{verdict} ({self.seconds:.0f} s)"

    def to_json(self) -> str:
        """The report as JSON: ``{"ok", "seconds", "checks": [{"name", "found", "ok", "remedy"}]}``."""
        checks = [asdict(finding) for finding in self.findings]
        return json.dumps({"ok": self.ok, "seconds": round(self.seconds, 1), "checks": checks}, ensure_ascii=False)

    def show(self, console: Console) -> None:
        """Print a table on a terminal, and plain lines otherwise."""
        if not console.is_terminal:
            width = max((len(finding.name) for finding in self.findings), default=0)
            for finding in self.findings:
                line = f"{'ok  ' if finding.ok else 'FAIL'}  {finding.name:<{width}}  {finding.found}"
                console.print(line, markup=False, highlight=False, soft_wrap=True)
                if finding.remedy:
                    console.print(f"      to do: {finding.remedy}", markup=False, highlight=False, soft_wrap=True)
            console.print(self.summary, markup=False, highlight=False)
            return
        console.print(_table(self.findings))
        console.print(self.summary, style="green" if self.ok else "bold red", highlight=False)


def _table(findings: Sequence[Finding]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        status = Text("ok", "green") if finding.ok else Text("fail", "bold red")
        found = Text(finding.found)
        if finding.remedy:
            found.append(f"\n→ {finding.remedy}", "yellow")
        table.add_row(status, finding.name, found)
    return table
