"""From text to token ids: a tokenizer out of a Hugging Face folder, or a word vocabulary built from training texts.

Both give what a text task needs: ``encode`` and the id of the padding, which no text contains.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from archsmith.core.errors import MissingExtra, Shown, UserError

SPECIAL = ("<pad>", "<unk>", "<cls>")
"""First entries of a word vocabulary: padding, unknown words, and the token in front of every text."""

_WORD = re.compile(r"\w+|[^\w\s]")
_PADS = ("[PAD]", "<pad>")


class Tokenizer(Protocol):
    """What a text task asks of a tokenizer.

    Attributes:
        name: What it is, for records.
        size: Number of ids; every id is below it.
        pad_id: Id of the padding.
        filler_id: An id that stands for something, for inputs whose values mean nothing.
    """

    name: str
    size: int
    pad_id: int
    filler_id: int

    def encode(self, texts: Sequence[str], length: int) -> list[list[int]]:
        """Return the ids of every text, at most ``length`` each, special tokens included."""


def words(text: str) -> list[str]:
    """Return the words and punctuation marks of a text, in lower case."""
    return _WORD.findall(text.lower())


class WordVocabulary:
    """The most frequent words of some texts; all others are ``<unk>``.

    Args:
        texts: The training texts; no other part of the data may have a say.
        limit: Entries at most, ``SPECIAL`` included.
        least: A word that occurs less often is left out.

    Attributes:
        entries: Words by their ids, by falling frequency, equal ones in alphabetical order.
    """

    def __init__(self, texts: Iterable[str], *, limit: int = 10_000, least: int = 1) -> None:
        counts = Counter(word for text in texts for word in words(text))
        often = sorted((-count, word) for word, count in counts.items() if count >= least)
        self.entries = (*SPECIAL, *(word for _, word in often[: limit - len(SPECIAL)]))
        self._ids = {word: number for number, word in enumerate(self.entries)}
        self.size, self.pad_id, self.filler_id = len(self.entries), 0, 1
        self.name = f"{self.size} words of the training texts"

    def encode(self, texts: Sequence[str], length: int) -> list[list[int]]:
        """See ``Tokenizer``."""
        unknown, first = self._ids["<unk>"], self._ids["<cls>"]
        return [[first, *(self._ids.get(word, unknown) for word in words(text)[: length - 1])] for text in texts]


class PretrainedTokenizer:
    """The tokenizer of a pre-trained network, run by the package ``tokenizers``.

    Args:
        path: A folder in the form of Hugging Face with ``tokenizer.json`` or ``vocab.txt`` (WordPiece), or one of these
            files.

    Raises:
        UserError: There is no tokenizer, it cannot be read, or it has no token for padding.
        MissingExtra: ``tokenizers`` is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            package = import_module("tokenizers")
        except ImportError as error:
            raise MissingExtra("tokenizers", "text", "a pre-trained tokenizer") from error
        file = tokenizer_file(path)
        settings = _settings(file.parent)
        try:
            if file.suffix == ".json":
                self._tokenizer: Any = package.Tokenizer.from_file(str(file))
            else:
                lower = bool(settings.get("do_lower_case", True))
                self._tokenizer = package.BertWordPieceTokenizer(str(file), lowercase=lower)
        except Exception as error:  # the package raises plain Exception for anything that it cannot read
            raise UserError("tokenizer", str(file), allowed="a file that the package tokenizers can read") from error
        given = [settings.get("pad_token"), *_PADS]
        named = [pad["content"] if isinstance(pad, dict) else pad for pad in given]
        found = [number for pad in named if pad and (number := self._tokenizer.token_to_id(pad)) is not None]
        if not found:
            raise UserError(
                "tokenizer",
                Shown(f"{file}, which has no token for padding"),
                allowed="a tokenizer with one",
                hint="Name it as pad_token in tokenizer_config.json beside it.",
            )
        self.pad_id: int = found[0]
        self.filler_id = 1 if self.pad_id == 0 else 0
        self.size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.name = f"{file.name} with SHA-256 {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"
        self._tokenizer.no_padding()

    def encode(self, texts: Sequence[str], length: int) -> list[list[int]]:
        """See ``Tokenizer``."""
        self._tokenizer.enable_truncation(length)
        return [each.ids for each in self._tokenizer.encode_batch(list(texts))]


def tokenizer_file(path: str | Path) -> Path:
    """Return the file of a tokenizer, found in a folder or given as such.

    Raises:
        UserError: There is none.
    """
    given = Path(path).expanduser()
    names = ("tokenizer.json", "vocab.txt")
    found = [given] if given.is_file() else [given / name for name in names if (given / name).is_file()]
    if not found or found[0].suffix not in (".json", ".txt"):
        raise UserError(
            "tokenizer",
            Shown(f"{path}, where there is no {' or '.join(names)}"),
            allowed="a Hugging Face folder with a tokenizer, or one of these files",
            hint="Without tokenizer= the vocabulary is built from the words of the training texts.",
        )
    return found[0]


def _settings(folder: Path) -> dict[str, Any]:
    """Return what the files beside a tokenizer say about it."""
    said: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            try:
                read = json.loads((folder / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError("tokenizer", str(folder / name), allowed="a file in JSON") from error
            said.update(read if isinstance(read, dict) else {})
    return said
