"""What a verification finds: rows of checks, each with its numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from archsmith.core.errors import MissingExtra

Status = Literal["ok", "failed", "not checked"]


class NotChecked(Exception):
    """Raised by a check that cannot be made here; its text says why. That is no failure of the result."""


class Failed(Exception):
    """Raised by a check that found a mismatch; its text has the numbers."""


@dataclass(frozen=True)
class Row:
    """One check.

    Attributes:
        subject: Label of the network it is about, ``"run"`` for the run itself.
        name: What was checked.
        status: ``"ok"``, ``"failed"`` or ``"not checked"``.
        detail: The numbers, or the reason.
    """

    subject: str
    name: str
    status: Status
    detail: str


@dataclass(frozen=True)
class Report:
    """All rows of a verification, in the order of the checks."""

    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed; checks that could not be made do not count against the result."""
        return not self.failed

    @property
    def failed(self) -> tuple[Row, ...]:
        """The rows that failed."""
        return tuple(row for row in self.rows if row.status == "failed")

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {"ok": self.ok, "rows": [asdict(row) for row in self.rows]}


@dataclass
class Rows:
    """Collects the rows about one subject."""

    subject: str
    rows: list[Row] = field(default_factory=list)

    def check(self, name: str, check: Callable[[], str]) -> bool:
        """Run one check and add its row; return whether it passed.

        ``check`` returns the detail of an ok row. ``NotChecked`` and ``MissingExtra`` make a row that was not checked.
        Every other exception makes a failed one: the files may come from anywhere and hold anything, and whatever they
        provoke is a finding about them, never the end of the report.
        """
        status: Status = "ok"
        try:
            detail = check()
        except (NotChecked, MissingExtra) as reason:
            status, detail = "not checked", str(reason)
        except Failed as finding:
            status, detail = "failed", str(finding)
        except Exception as error:
            status, detail = "failed", f"{type(error).__name__}: {error}"
        self.rows.append(Row(self.subject, name, status, detail))
        return status == "ok"

    def report(self) -> Report:
        """Return the rows so far."""
        return Report(tuple(self.rows))
