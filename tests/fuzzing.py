"""How much the fuzz tests try, and what they print of it with pytest's -s.

FUZZ=10 tries ten times as many, of another seed. docs/robustness.md has the command that prints all counts.
"""

import os
import resource
from collections import Counter

TIMES = int(os.environ.get("FUZZ", "1"))


def tell(what: str, outcomes: Counter[str]) -> None:
    """Prints how often each outcome was met, and the most memory that the process has had."""
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\nfuzzing: {outcomes.total()} {what}: {counts}; peak memory so far {peak:.0f} MB")
