"""Programs that tests start: from where, and how long they may take on a busy machine."""

from pathlib import Path

from asymvq_jax.config import Config, to_json

# Of the repository.
ROOT = Path(__file__).parents[1]
# Seconds.
DEADLINE = 300


def write_config(file: Path, config: Config) -> Path:
    """Writes a configuration file that holds `config`, and returns its path."""
    text = "import json\nfrom asymvq_jax.config import Config, from_dict\n"
    file.write_text(f"{text}def get_config():\n    return from_dict(Config, json.loads({to_json(config)!r}))\n")
    return file
