"""Texts to tokens, by the tokenizer of transformers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from asymvq_jax.diffusion.clip import TextConfig
from asymvq_jax.errors import TokenizerError

log = logging.getLogger(__name__)


class Tokenizer:
    """CLIP's tokenizer, for texts of a fixed number of tokens, filled up with the token `pad`."""

    def __init__(self, tokenizer: Any, length: int, pad: int) -> None:
        self._tokenizer = tokenizer
        self._length = length
        self._pad = pad

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(b, length) int32; longer texts are cut, and a warning says what is lost."""
        rows = np.full((len(texts), self._length), self._pad, np.int32)
        for row, text in zip(rows, texts, strict=True):
            # Not verbose: its own warning of long texts does not name what is cut.
            tokens = self._tokenizer(text, truncation=False, verbose=False).input_ids
            # The last token of all is the end's.
            if len(tokens) > self._length:
                kept, lost = tokens[: self._length - 1], tokens[self._length - 1 : -1]
                log.warning(
                    "the text has more than %d tokens and is cut; left out: %r",
                    self._length,
                    self._tokenizer.decode(lost),
                )
                tokens = [*kept, tokens[-1]]
            row[: len(tokens)] = tokens
        return rows


def read_tokenizer(folder: Path, config: TextConfig, pad: int | None = None) -> Tokenizer:
    """Reads a pipeline's tokenizer/ folder.

    Args:
        folder: the folder.
        config: the text encoder's sizes.
        pad: the token that fills up short texts; by default the folder's.

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
    except Exception as error:  # transformers raises errors of many kinds.
        raise TokenizerError(f"{folder} is not a readable CLIP tokenizer: {type(error).__name__}: {error}") from None
    if len(tokenizer) > config.vocabulary:
        raise TokenizerError(f"{folder} has {len(tokenizer)} tokens; the text encoder has only {config.vocabulary}")
    return Tokenizer(tokenizer, config.length, tokenizer.pad_token_id if pad is None else pad)
