"""Texts to tokens, by the tokenizer of transformers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from asymvq_jax.config import UserError
from asymvq_jax.diffusion.clip import TextConfig

log = logging.getLogger(__name__)


class TokenizerError(UserError):
    """A folder that is no tokenizer, or one of another model."""


class Tokenizer:
    """CLIP's tokenizer, for texts of a fixed number of tokens."""

    def __init__(self, tokenizer: object, length: int) -> None:
        self._tokenizer = tokenizer
        self._length = length

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(b, length) int32; longer texts are cut, and a warning says what is lost."""
        for text in texts:
            tokens = self._tokenizer(text, truncation=False).input_ids
            # The last token of all is the end's.
            if len(tokens) > self._length:
                lost = self._tokenizer.decode(tokens[self._length - 1 : -1])
                log.warning("the text is longer than %d tokens and is cut: lost is %r", self._length, lost)
        options = {"padding": "max_length", "max_length": self._length, "truncation": True}
        return np.asarray(self._tokenizer(list(texts), **options).input_ids, np.int32)


def read_tokenizer(folder: Path, config: TextConfig) -> Tokenizer:
    """Reads a pipeline's tokenizer/ folder.

    Raises:
        TokenizerError: no CLIP tokenizer there, or one with more tokens than the encoder knows.
    """
    # Imported here, for it takes seconds.
    from transformers import CLIPTokenizer

    names = {"vocab.json", "merges.txt", "tokenizer.json"}
    if not folder.is_dir() or not names & {file.name for file in folder.iterdir()}:
        raise TokenizerError(f"no tokenizer at {folder}: expected a folder with vocab.json and merges.txt")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises whatever its reader met.
        raise TokenizerError(f"{folder} is no readable CLIP tokenizer: {error}") from None
    if len(tokenizer) > config.vocabulary:
        raise TokenizerError(f"{folder} has {len(tokenizer)} tokens, and the text encoder knows {config.vocabulary}")
    return Tokenizer(tokenizer, config.length)
