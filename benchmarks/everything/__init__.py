"""All that a new accelerator is asked, in a given time: asymvq benchmark everything --minutes 9 --out DIR."""

from benchmarks.everything.command import main as main
