"""Names of what may replace the policy's chunk, and of the arms that rollouts compare. Needs no torch."""

from __future__ import annotations

import re

HEAD_MODES, MEMORY_MODES = ("rerank", "refine"), ("retrieve",)
BOTH = "rerank+retrieve"
MODES = (*HEAD_MODES, *MEMORY_MODES, BOTH)
"""Every mode there is; a checkpoint may allow fewer."""
SELF_TIMED = ("replan", "recommended")
"""Arms that decide themselves when to ask again."""
_COUNT = re.compile("[1-9][0-9]*")


def split_arm(arm: str) -> tuple[str, int | None]:
    """`policy@4` is `("policy", 4)`, `policy` is `("policy", None)`.

    Raises:
        ValueError: no name; an n that is not an integer of 1 or more in plain digits (`policy@04` would run `policy@4`
            again under another name); or an n for an arm that chooses its own.
    """
    name, mark, every = arm.partition("@")
    if not name or (mark and not _COUNT.fullmatch(every)):
        raise ValueError(
            f"arm {arm!r}: expected ARM or ARM@n, n steps between decisions, an integer of 1 or more without leading "
            "zeros, e.g. policy@4"
        )
    if mark and name in SELF_TIMED:
        raise ValueError(f"arm {arm!r}: {name} decides itself when to ask again, so without @n")
    return name, int(every) if mark else None
