"""What the policy does where the energy fails: its own chunk, counted and loud. No reranker may stop a robot."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Fallback:
    """Calls what may fail, and counts what did.

    Args:
        strict: failures are raised. For evaluation, where a bug must end the run: an episode of the policy's own chunks
            would be counted as one of the arm.
        fatal: exceptions that are raised in any case: the program is used wrongly, and says so.

    Attributes:
        counts: failures by class name.
    """

    def __init__(self, strict: bool, fatal: tuple[type[Exception], ...] = ()) -> None:
        self.strict, self._fatal = strict, fatal
        self.counts: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """How often something failed."""
        return sum(self.counts.values())

    def __call__(self, attempt: Callable[[], T], own: Callable[[], T], what: str) -> T:
        """`attempt()`, or after any exception of it `own()`, whose exceptions are nobody's to catch.

        The first failure is logged with its traceback, the later ones in a line, at every doubling of their number.

        Args:
            what: what was attempted, for the log.
        """
        try:
            return attempt()
        except Exception as error:
            if isinstance(error, self._fatal):
                raise
            self.failed(error, what)
        return own()

    def failed(self, error: Exception, what: str, answer: str = "the policy's own chunk is taken") -> None:
        """Counts and logs a failure and what is done about it, `answer`; raises it where `strict`."""
        if self.strict:
            raise error
        self.counts[type(error).__name__] += 1
        total = self.total
        message = "%s failed, %s (%d times so far): %s: %s"
        if not total & (total - 1):
            shown = error if total == 1 else None
            logger.error(message, what, answer, total, type(error).__name__, error, exc_info=shown)
