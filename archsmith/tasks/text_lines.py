"""Text files as batches of token ids: running text for causal models, one text a line for encoders.

A file is all it takes: no labels, the parent is the teacher. The last batches are held back for validation.
"""

from __future__ import annotations

import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from archsmith.core.errors import MissingExtra, Shown, UserError
from archsmith.core.files import storage_errors
from archsmith.core.rng import numpy_stream

Kind = Literal["language-modelling", "sentences"]
"""``language-modelling``: the whole file is one text, cut into blocks of ``length`` tokens. ``sentences``: every line
is a text, cut off at ``length`` tokens, padded to the longest of its batch, with a mask."""

KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class TextOptions:
    """How a text file becomes batches.

    Attributes:
        tokenizer: Folder or file of ``tokenizer.json``; None for that of the model.
        length: Tokens of a block, or of a line at most.
        batch: Sequences of a batch.
        train: Batches for training at most.
        valid: Batches that are held back.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    tokenizer: str | None = None
    length: int = 64
    batch: int = 8
    train: int = 48
    valid: int = 8

    def __post_init__(self) -> None:
        for name, least in (("length", 2), ("batch", 1), ("train", 2), ("valid", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise UserError(f"task.{name}", value, allowed=f"an integer from {least}")


def open_tokenizer(path: str | Path | None) -> Any:
    """Return the tokenizer of a folder or file (``tokenizers.Tokenizer``).

    Raises:
        UserError: There is none; says what was looked for.
        MissingExtra: The package tokenizers is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingExtra("tokenizers", "text", "Reading text") from error
    file = None if path is None else Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if file is None or not file.is_file():
        raise UserError(
            "tokenizer",
            Shown("none" if file is None else f"no file {file}"),
            allowed="a tokenizer.json beside the model",
            hint="Name its folder: --task-set tokenizer=FOLDER. A model of transformers writes it with "
            "tokenizer.save_pretrained(FOLDER).",
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:
        raise UserError("tokenizer", Shown(f"{file} ({error})"), allowed="a tokenizer.json that can be read") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def text_batches(
    kind: str, data: str | Path | None, options: TextOptions, tokenizer: Any, *, seed: int = 0
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return training and validation batches, as keywords of a model of transformers.

    Args:
        kind: See ``Kind``.
        data: Text file, UTF-8; ``.xz`` is unpacked.
        options: How.
        tokenizer: What ``open_tokenizer`` returned.
        seed: Of the choice of lines and blocks.

    Raises:
        UserError: An unknown kind, no file, or one that is too short.
    """
    if kind not in KINDS:
        raise UserError("task", kind, allowed=" or ".join(KINDS))
    if data is None:
        raise UserError("data", None, allowed=f"a text file for the task {kind}", hint="Give --data FILE.")
    with storage_errors("data", data):
        path = Path(data)
        content = path.read_bytes()
        raw = (lzma.decompress(content) if path.suffix == ".xz" else content).decode("utf-8")
    rows = _blocks(raw, options, tokenizer) if kind == "language-modelling" else _lines(raw, options, tokenizer)
    needed = options.batch * (options.valid + 2)
    if len(rows) < needed:
        raise UserError(
            "data",
            Shown(f"{data}, {len(rows)} {'blocks' if kind == 'language-modelling' else 'lines'}"),
            allowed=f"at least {needed} of them for {options.valid} validation batches of {options.batch}",
            hint="Give more text, or smaller batch=, length= or valid= by --task-set.",
        )
    picked = numpy_stream(seed, "text").permutation(len(rows))
    rows = [rows[i] for i in picked[: options.batch * (options.train + options.valid)]]
    valid = rows[: options.batch * options.valid]
    train = rows[options.batch * options.valid :]
    padded = kind == "sentences"
    return tuple(  # type: ignore[return-value]
        [_batch(part[i : i + options.batch], padded) for i in range(0, len(part) - options.batch + 1, options.batch)]
        for part in (train, valid)
    )


def _blocks(text: str, options: TextOptions, tokenizer: Any) -> list[list[int]]:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return [ids[i : i + options.length] for i in range(0, len(ids) - options.length + 1, options.length)]


def _lines(text: str, options: TextOptions, tokenizer: Any) -> list[list[int]]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [encoding.ids[: options.length] for encoding in tokenizer.encode_batch(lines) if encoding.ids]


def _batch(rows: list[list[int]], padded: bool) -> dict[str, Any]:
    if not padded:
        return {"input_ids": torch.tensor(rows), "use_cache": False}
    longest = max(map(len, rows))
    ids: Tensor = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}
