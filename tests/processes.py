"""Programs that tests start: from where, and how long they may take on a busy machine."""

from pathlib import Path

# Of the repository.
ROOT = Path(__file__).parents[1]
# Seconds.
DEADLINE = 300
