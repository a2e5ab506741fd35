"""Text tasks by name: SST-2, AG News, files of one's own, and remarks that are always there.

``sst2``: the Stanford Sentiment Treebank as in GLUE (Socher et al. 2013; Wang et al. 2019). ``data`` is a folder with
``train``, and ``valid`` and ``test`` or, as GLUE gives it, ``dev`` with labels, which then is the test part (columns
sentence, label; TSV). ``ag-news``: four topics of news (Zhang et al. 2015), columns label (0 to 3) and text. ``text``:
any labelled texts, a file or a folder, see ``archsmith.tasks.text_files``. ``phrases``: made by a grammar.

Where a pre-trained network is to read the texts, ``tokenizer`` must be the network's own folder. Without it ids stand
for the words of the training texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from archsmith.core.errors import Shown, UserError
from archsmith.tasks.bounds import one_of, real, whole
from archsmith.tasks.phrases import CLASSES, phrases
from archsmith.tasks.split import planned_splits
from archsmith.tasks.text import PADDING, TextClassification
from archsmith.tasks.text_files import PARTS, class_numbers, classes_of, find_parts, read_texts
from archsmith.tasks.tokens import PretrainedTokenizer, Tokenizer, WordVocabulary

TASKS = (
    {
        "name": "ag-news",
        "title": "news in four topics",
        "data": "folder with train and test (TSV, CSV or JSON lines)",
        "metric": "accuracy",
    },
    {
        "name": "phrases",
        "title": "made-up remarks of praise and blame with negations, 1,600",
        "data": "embedded",
        "metric": "accuracy",
    },
    {
        "name": "sst2",
        "title": "sentiment of phrases from film reviews, two classes (GLUE)",
        "data": "folder with train, valid, test (TSV)",
        "metric": "accuracy",
    },
    {
        "name": "text",
        "title": "texts of your own with labels",
        "data": "file (CSV, TSV, JSON lines) or folder with train, valid, test",
        "metric": "accuracy",
    },
)

_NAMED: dict[str, tuple[dict[str, tuple[str, ...]], tuple[str, ...]]] = {
    "sst2": (PARTS, ("negative", "positive")),
    "ag-news": (PARTS, ("World", "Sports", "Business", "Sci/Tech")),
}
_LENGTHS = {"sst2": 64, "phrases": 24}


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """What ``open_task`` accepts beside ``data`` for every text task; None means the task's own default.

    Attributes:
        tokenizer: Folder of a pre-trained network with ``tokenizer.json`` or ``vocab.txt``, or such a file. None: the
            words of the training texts.
        max_tokens: Longest input, special tokens included; what is beyond is cut off.
        padding: ``"longest"`` of a batch, or ``"full"``.
        vocabulary: Words at most where there is no tokenizer.
        least_count: A rarer word of the training texts is unknown, where there is no tokenizer.
        limit: Use the first so many texts per class of each given part, for quick trials.
        valid_fraction: Share of the training part that becomes the valid part where the data brings none.
        test_fraction: Share that becomes the test part where the data brings none.
    """

    tokenizer: str | Path | None = None
    max_tokens: int | None = None
    padding: str = "longest"
    vocabulary: int = 10_000
    least_count: int = 1
    limit: int | None = None
    valid_fraction: float | None = None
    test_fraction: float | None = None

    def __post_init__(self) -> None:
        if self.tokenizer is not None and not isinstance(self.tokenizer, str | Path):
            raise UserError("tokenizer", Shown(type(self.tokenizer).__name__), allowed="the path of a tokenizer")
        if self.max_tokens is not None:
            whole("max_tokens", self.max_tokens, low=2, high=4096)
        one_of("padding", self.padding, PADDING)
        whole("vocabulary", self.vocabulary, low=4, high=10**6)
        whole("least_count", self.least_count, low=1, high=10**6)
        if self.limit is not None:
            whole("limit", self.limit, low=2, high=10**9)
        for field in ("valid_fraction", "test_fraction"):
            if getattr(self, field) is not None:
                real(field, getattr(self, field), low=0.01, high=0.5)


def make(name: str, *, data: Any, options: Mapping[str, Any]) -> TextClassification:
    """Return a text task; see ``archsmith.tasks.open_task``."""
    known = [field.name for field in fields(TextOptions)]
    for key in options:
        if key not in known:
            raise UserError(f"option of task {name}", key, allowed=", ".join(known))
    chosen = TextOptions(**options)
    texts, labels, parts, class_names = _embedded(data) if name == "phrases" else _from_files(name, data)
    splits = planned_splits(
        name,
        np.array(labels),
        parts,
        class_names=class_names,
        valid_fraction=chosen.valid_fraction,
        test_fraction=chosen.test_fraction,
        limit=chosen.limit,
    )
    tokenizer: Tokenizer
    if chosen.tokenizer is None:
        heard = (texts[index] for index in splits["train"].tolist())
        tokenizer = WordVocabulary(heard, limit=chosen.vocabulary, least=chosen.least_count)
    else:
        tokenizer = PretrainedTokenizer(chosen.tokenizer)
    length = chosen.max_tokens or _LENGTHS.get(name, 128)
    return TextClassification(
        name,
        tokenizer.encode(texts, length),
        labels,
        tokenizer=tokenizer,
        class_names=class_names,
        splits=splits,
        length=length,
        padding=chosen.padding,
        digest=tokenizer.name,
    )


_Texts = tuple[list[str], list[int], dict[str, Any], tuple[str, ...]]


def _embedded(data: Any) -> _Texts:
    if data is not None:
        raise UserError("data", str(data), allowed="nothing for the task phrases, whose texts are embedded")
    texts, labels = phrases()
    return texts, labels, {"train": np.arange(len(texts))}, CLASSES


def _from_files(name: str, data: Any) -> _Texts:
    if data is None or not isinstance(data, str | Path) or not Path(data).expanduser().exists():
        raise UserError(
            "data",
            None if data is None else str(data),
            allowed="a file or folder of labelled texts that exists",
            hint="write data=PATH (on the command line --data PATH); archsmith never downloads on its own.",
        )
    path = Path(data).expanduser()
    names, class_names = _NAMED.get(name, (PARTS, ()))
    if name == "sst2" and path.is_dir() and any(path.glob("dev.*")):
        names = {"train": PARTS["train"], "test": ("dev",)}  # GLUE's own test part has no labels
    read = {part: read_texts(file) for part, file in find_parts(path, names).items()}
    written = tuple(str(number) for number in range(len(class_names))) or classes_of(read["train"])
    texts: list[str] = []
    labels: list[int] = []
    parts = {}
    for part, rows in read.items():
        parts[part] = np.arange(len(texts), len(texts) + len(rows.texts))
        texts += rows.texts
        labels += class_numbers(rows, written)
    return texts, labels, parts, class_names or written
