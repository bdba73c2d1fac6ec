"""How far each worker is with one stage's work, and when that is worth a word. Sans-IO."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from meshnode.config import human_duration
from meshnode.gateway.view import WorkerProgress
from meshnode.models.forecast import Forecast, Outlook

STEPS = 4
"""A worker's load is told of in quarters; the last one is told by what it read, once all is."""


class Headway:
    """I keep the latest figures of every worker."""

    def __init__(self, total_bytes: Mapping[str, int]) -> None:
        """`total_bytes` by worker: what the plan gives it, for as long as nobody knows better."""
        self._planned_bytes = total_bytes
        self._latest: dict[str, WorkerProgress] = {}

    @property
    def workers(self) -> tuple[WorkerProgress, ...]:
        return tuple(self._latest.values())

    @property
    def done(self) -> float | None:
        """All workers together, from 0 to 1."""
        total_bytes = sum(worker.total_bytes for worker in self.workers)
        done_bytes = sum(worker.done_bytes for worker in self.workers)
        return done_bytes / total_bytes if total_bytes else None

    def take(self, reports: Iterable[WorkerProgress]) -> list[WorkerProgress]:
        """Those that have come a quarter further, and are not done."""
        return [told for report in reports if (told := self._take_one(report))]

    def _take_one(self, report: WorkerProgress) -> WorkerProgress | None:
        total_bytes = report.total_bytes or self._planned_bytes.get(report.node, 0)
        done_bytes = min(report.done_bytes, total_bytes) if total_bytes else report.done_bytes
        before = self._latest.get(report.node)
        now = WorkerProgress(report.node, done_bytes, total_bytes)
        self._latest[report.node] = now
        passed = _steps(now) > (_steps(before) if before else 0)
        return now if passed and _steps(now) < STEPS else None


class Pulling:
    """The same of machines that pull their parts, and how long they will."""

    def __init__(self) -> None:
        self._headway = Headway({})
        self._forecasts: defaultdict[str, Forecast] = defaultdict(Forecast)
        self._outlooks: dict[str, Outlook] = {}

    @property
    def workers(self) -> tuple[WorkerProgress, ...]:
        return self._headway.workers

    @property
    def done(self) -> float | None:
        return self._headway.done

    @property
    def text(self) -> str:
        """How long the last of them will take; nothing where one cannot be foreseen."""
        etas_s = [outlook.eta_s for outlook in self._outlooks.values()]
        known_s = [eta_s for eta_s in etas_s if eta_s is not None]
        longest_s = max(known_s, default=0.0)
        if len(known_s) < len(etas_s) or not longest_s:
            return ""
        return f": {human_duration(longest_s)} left"

    def take(self, report: WorkerProgress, now: float) -> str | None:
        """A sentence where it has come a quarter further."""
        outlook = self._forecasts[report.node].take(report.done_bytes, report.total_bytes, now)
        self._outlooks[report.node] = outlook
        news = self._headway.take((report,))
        return f"{report.node} pulls its part: {outlook}" if news else None


def _steps(worker: WorkerProgress) -> int:
    return worker.done_bytes * STEPS // worker.total_bytes if worker.total_bytes else 0
