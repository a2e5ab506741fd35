from __future__ import annotations

import gzip
import json
import lzma

import numpy as np
import pytest
import torch
from shared_data import shared_data

from archsmith.core.errors import MissingExtra, UserError
from archsmith.tasks import open_task
from archsmith.tasks.phrases import CLASSES, phrases
from archsmith.tasks.tokens import WordVocabulary, words
from archsmith.testing.tasks import TaskContract

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "film", "is", "good", "bad", "un", "##good", "##ly"]
ROWS = [("the film is good", "1"), ("the film is bad", "0"), ("bad , bad film", "0"), ("good", "1")] * 5


def write_tsv(path, rows=ROWS, header="sentence\tlabel"):
    path.write_text(header + "\n" + "".join(f"{text}\t{label}\n" for text, label in rows), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path):
    """A folder with the three parts of a small SST-2, and a WordPiece vocabulary."""
    for part in ("train", "valid", "test"):
        write_tsv(tmp_path / f"{part}.tsv", ROWS if part == "train" else ROWS[:6])
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    return tmp_path


class TestPhrases(TaskContract):
    input_dtype = torch.int64

    @pytest.fixture
    def make_task(self):
        return lambda: open_task("phrases", limit=60, padding="full")

    def forward(self, weight):
        return lambda inputs: (inputs % 7).float() @ weight

    def literal_scores(self, task, forward):
        right, losses = [], []
        for batch in task.batches("valid", batch_size=1):
            logits = forward(batch.inputs).double()[0]
            losses.append(float(logits.logsumexp(0) - logits[batch.targets[0]]))
            right.append(int(logits.argmax()) == int(batch.targets[0]))
        return {"accuracy": sum(right) / len(right), "loss": sum(losses) / len(losses)}


class TestLongest(TestPhrases):
    """The same with batches as long as their longest text: what joins or compares whole parts does it padded."""

    @pytest.fixture
    def make_task(self):
        return lambda: _Padded(open_task("phrases", limit=60))


class _Padded:
    """A task whose batches are padded after the fact, to be compared by the contract."""

    def __init__(self, task):
        self._task = task

    def __getattr__(self, name):
        return getattr(self._task, name)

    def batches(self, split, **given):
        return self._padded(self._task.batches(split, **given))

    def _padded(self, batches):
        length = self._task.input_shape[0]
        for batch in batches:
            missing = length - batch.inputs.shape[1]
            padded = torch.nn.functional.pad(batch.inputs, (0, missing), value=self._task.pad_id)
            yield type(batch)(padded, batch.targets, batch.context)

    def evaluate(self, forward, split, **given):
        def padded(ids):
            return forward(torch.nn.functional.pad(ids, (0, self._task.input_shape[0] - ids.shape[1])))

        return self._task.evaluate(padded, split, **given)


# --------------------------------------------------------------------- batches


def test_batches_are_padded_and_the_context_says_where(folder):
    task = open_task("sst2", data=folder)
    assert task.kind == "text" and task.class_names == ("negative", "positive")
    for split in ("train", "test"):
        for batch in task.batches(split, batch_size=4):
            mask = batch.context["attention_mask"]
            assert batch.inputs.dtype == mask.dtype == torch.int64
            assert torch.equal(mask, (batch.inputs != task.pad_id).long())
            assert int(mask.sum(1).max()) == batch.inputs.shape[1]  # no longer than the longest
            assert bool((mask.diff(dim=1) <= 0).all())  # padding on the right
            assert int(batch.inputs.max()) < task.vocab_size
            with pytest.raises(TypeError):
                batch.context["attention_mask"] = mask
    assert task.examples(2).shape == (2, 64)
    plain = task.plain_inputs(2)
    assert plain.shape == (2, 64) and bool((plain != task.pad_id).all())


def test_training_batches_hold_texts_of_similar_length():
    sorted_, full = open_task("phrases"), open_task("phrases", padding="full")
    waste = {}
    for task in (sorted_, full):
        kept = [batch.inputs for batch in task.batches("train", batch_size=16)]
        waste[task.padding] = sum(ids.numel() for ids in kept) / sum(int((ids != 0).sum()) for ids in kept)
        seen = torch.cat([torch.nn.functional.pad(ids, (0, 24 - ids.shape[1])) for ids in kept])
        assert len(seen.unique(dim=0)) == len(seen) == task.steps_per_epoch(16) * 16  # every text once
    assert waste["longest"] < 1.1 < 2 < waste["full"]


def test_the_order_is_resumed_within_sorted_windows():
    task = open_task("phrases")
    whole = [batch.targets for batch in task.batches("train", batch_size=8, seed=4, epoch=1)]
    rest = [batch.targets for batch in task.batches("train", batch_size=8, seed=4, epoch=1, start=50)]
    assert all(torch.equal(a, b) for a, b in zip(whole[50:], rest, strict=True))


def test_both_paddings_are_the_same_texts():
    short, full = (next(open_task("phrases", padding=p).batches("valid", batch_size=9)) for p in ("longest", "full"))
    length = short.inputs.shape[1]
    assert torch.equal(short.inputs, full.inputs[:, :length]) and not full.inputs[:, length:].any()


# --------------------------------------------------------------------- vocabularies


def test_a_vocabulary_knows_training_words_alone(folder):
    write_tsv(folder / "test.tsv", [("the unheard film", "1"), ("bad", "0")])
    task = open_task("sst2", data=folder)
    first = task.examples(1)[0].tolist()
    vocabulary = WordVocabulary([text for text, _ in ROWS])
    names = [vocabulary.entries[number] for number in first if number]
    assert names == ["<cls>", "the", "<unk>", "film"]
    assert task.vocab_size == vocabulary.size == 3 + len({word for text, _ in ROWS for word in words(text)})


def test_frequent_words_first_then_the_alphabet():
    vocabulary = WordVocabulary(["b a", "b c A!"], limit=6)
    assert vocabulary.entries == ("<pad>", "<unk>", "<cls>", "a", "b", "!")
    assert WordVocabulary(["b a", "b c A!"], least=2).entries[3:] == ("a", "b")
    assert vocabulary.encode(["c b ! b"], 4) == [[2, 1, 4, 5]]


def test_a_pretrained_tokenizer_is_found_in_its_folder(folder):
    pytest.importorskip("tokenizers")
    task = open_task("sst2", data=folder, tokenizer=folder, max_tokens=5)
    assert task.vocab_size == len(VOCAB) and task.pad_id == 0 and task.input_shape == (5,)
    ids = task.examples(4).tolist()
    assert ids[0] == [2, 4, 5, 6, 3]  # cut off within the special tokens
    assert ids[3] == [2, 7, 3, 0, 0]
    assert task.digest != open_task("sst2", data=folder, max_tokens=5).digest


def test_tokenizer_json_brings_its_own_padding_which_is_not_used(folder):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.BertWordPieceTokenizer(str(folder / "vocab.txt"))
    made.enable_padding(length=40)
    made.enable_truncation(3)
    made.save(str(folder / "tokenizer.json"))
    task = open_task("sst2", data=folder, tokenizer=folder, padding="full", max_tokens=12)
    assert task.examples(1).tolist() == [[2, 4, 5, 6, 7, 3, 0, 0, 0, 0, 0, 0]]


def test_no_tokenizer_in_the_folder_is_said(folder, tmp_path):
    with pytest.raises(
        UserError, match=r"no tokenizer.json or vocab.txt; allowed: .* Without tokenizer= the vocabulary"
    ):
        open_task("sst2", data=folder, tokenizer=tmp_path / "elsewhere")


def test_a_tokenizer_without_padding_or_in_ruins_is_said(folder, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    bare = tmp_path / "bare"
    bare.mkdir()
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, [])).save(str(bare / "tokenizer.json"))
    with pytest.raises(UserError, match=r"no token for padding.*pad_token in tokenizer_config"):
        open_task("sst2", data=folder, tokenizer=bare)
    (bare / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "b"}}))
    assert open_task("sst2", data=folder, tokenizer=bare).pad_id == 1
    (bare / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer.json.*tokenizers can read"):
        open_task("sst2", data=folder, tokenizer=bare)


def test_without_the_package_the_extra_is_named(folder, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtra, match=r"archsmith\[text\]"):
        open_task("sst2", data=folder, tokenizer=folder)


# --------------------------------------------------------------------- files


@pytest.mark.parametrize("ending", [".tsv", ".tsv.gz", ".tsv.xz", ".csv", ".jsonl", ".jsonl.xz"])
def test_every_form_of_a_file_is_the_same_task(tmp_path, ending):
    rows = [(f'{text}, said "he"', "good" if label == "1" else "bad") for text, label in ROWS]
    if ".tsv" in ending:
        text = "text\tlabel\n" + "".join(f"{t}\t{label}\n" for t, label in rows)
    elif ".csv" in ending:
        quoted = [(t.replace('"', '""'), label) for t, label in rows]
        text = "label,text\n" + "".join(f'{label},"{t}"\n' for t, label in quoted)
    else:
        text = "".join(json.dumps({"text": t, "label": label}) + "\n" for t, label in rows)
    opened = {".gz": gzip.open, ".xz": lzma.open}.get(ending[-3:], open)
    with opened(tmp_path / f"mine{ending}", "wt", encoding="utf-8") as stream:
        stream.write(text)
    write_tsv(tmp_path / "same.tsv", rows, header="text\tlabel")
    task, same = (open_task("text", data=tmp_path / name) for name in (f"mine{ending}", "same.tsv"))
    assert task.class_names == ("bad", "good") and task.digest == same.digest
    assert [task.size(split) for split in task.splits] == [14, 2, 4]


def test_empty_lines_are_skipped_and_empty_texts_are_not(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("text\tlabel\n\nfine\t0\n\nwell\t1\n" + "x\t0\ny\t1\n" * 4)
    assert sum(open_task("text", data=path).size(split) for split in ("train", "valid", "test")) == 10
    path.write_text("text\tlabel\nfine\t0\n \t1\n")
    with pytest.raises(UserError, match=r"an empty text in .*a.tsv, line 3"):
        open_task("text", data=path)
    path.write_text("text\tlabel\nfine\t\n")
    with pytest.raises(UserError, match=r"an empty label in .*line 2"):
        open_task("text", data=path)
    path.write_text("text\tlabel\n")
    with pytest.raises(UserError, match="without any row"):
        open_task("text", data=path)


def test_an_unknown_label_names_its_line(folder):
    write_tsv(folder / "test.tsv", [("good", "1"), ("odd", "7")])
    with pytest.raises(UserError, match=r"the label '7' in .*test.tsv, line 3; allowed: one of 0, 1"):
        open_task("sst2", data=folder)
    with pytest.raises(UserError, match=r"the label '7'.*one of 0, 1"):
        open_task("text", data=folder)


def test_numbers_are_sorted_as_numbers(tmp_path):
    rows = [(f"text {n}", str(n)) for n in (10, 9, 2) for _ in range(10)]
    assert open_task("text", data=write_tsv(tmp_path / "a.tsv", rows)).class_names == ("2", "9", "10")


def test_glue_gives_dev_as_the_test_part(tmp_path):
    write_tsv(tmp_path / "train.tsv")
    write_tsv(tmp_path / "dev.tsv", ROWS[:6])
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\tthe film\n")
    task = open_task("sst2", data=tmp_path)
    assert task.size("test") == 6 and task.size("train") + task.size("valid") == 20


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("review\tlabel\nx\t0\n", "columns review, label in .*line 2; allowed: a text .text or sentence. and a label"),
        ("text\tlabel\nonly\n", "columns text in .*line 2"),
        ("text\tlabel\na\t0\nb\t0\n", "one label, '0'"),
    ],
)
def test_wrong_columns_and_single_classes_are_said(tmp_path, content, said):
    (tmp_path / "a.tsv").write_text(content)
    with pytest.raises(UserError, match=said):
        open_task("text", data=tmp_path / "a.tsv")


def test_damaged_files_are_said(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 1}\n[1]\n')
    with pytest.raises(UserError, match=r"a list in .*line 2"):
        open_task("text", data=tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text("{\n")
    with pytest.raises(UserError, match=r"no JSON in .*line 1"):
        open_task("text", data=tmp_path / "a.jsonl")
    (tmp_path / "a.tsv.xz").write_bytes(b"no xz")
    with pytest.raises(UserError, match="cannot be read"):
        open_task("text", data=tmp_path / "a.tsv.xz")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"ends in .tsv, .csv, .jsonl"):
        open_task("text", data=tmp_path / "a.txt")
    with pytest.raises(UserError, match="no training file"):
        open_task("text", data=tmp_path)
    for name in ("train.tsv", "train.csv"):
        (tmp_path / name).write_text("text\tlabel\n")
    with pytest.raises(UserError, match=r"train.csv and train.tsv in .*allowed: one train file"):
        open_task("text", data=tmp_path)


def test_options_and_data_are_checked(tmp_path):
    with pytest.raises(UserError, match=r"data: got None.*never downloads"):
        open_task("sst2")
    with pytest.raises(UserError, match="option of task phrases: got 'flip'; allowed: tokenizer, max_tokens"):
        open_task("phrases", flip=True)
    with pytest.raises(UserError, match="max_tokens: got 1"):
        open_task("phrases", max_tokens=1)
    with pytest.raises(UserError, match="padding: got 'none'; allowed: longest, full"):
        open_task("phrases", padding="none")
    with pytest.raises(UserError, match="nothing for the task phrases"):
        open_task("phrases", data=tmp_path)


# --------------------------------------------------------------------- the embedded texts


def test_phrases_are_distinct_balanced_and_need_negations():
    texts, labels = phrases()
    assert len(set(texts)) == len(texts) == 1600 and CLASSES[1] == "praise"
    assert 0.45 < np.mean(labels) < 0.55
    said = dict(zip(texts, labels, strict=True))
    single = {t: label for t, label in said.items() if " but " not in t and " and " not in t}
    good = [label for t, label in single.items() if t.endswith(" good") and " not " not in t and " never " not in t]
    turned = [label for t, label in single.items() if t.endswith(" good") and (" not " in t or " never " in t)]
    assert {*turned} == {0} and 1 in good
    assert texts == phrases()[0]


def test_a_small_network_learns_the_phrases():
    task = open_task("phrases")
    torch.manual_seed(0)
    embedding, gru = torch.nn.Embedding(task.vocab_size, 16), torch.nn.GRU(16, 24, batch_first=True)
    head = torch.nn.Linear(24, 2)
    network = torch.nn.ModuleList([embedding, gru, head])

    def forward(ids):
        states, _ = gru(embedding(ids))
        last = (ids != task.pad_id).sum(1) - 1
        return head(states[torch.arange(len(ids)), last])

    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for epoch in range(8):
        for batch in task.batches("train", batch_size=32, epoch=epoch):
            optimizer.zero_grad()
            task.loss(forward, batch, torch.Generator())[0].backward()
            optimizer.step()
    assert task.evaluate(forward, "test")["accuracy"] > 0.9


# --------------------------------------------------------------------- real data


def test_real_sst2_and_ag_news():
    task = open_task("sst2", data=shared_data("sst2"), limit=50)
    assert [task.size(split) for split in task.splits] == [100, 100, 100]
    news = open_task("ag-news", data=shared_data("agnews"), limit=20)
    assert news.num_classes == 4 and news.size("test") == 80 and news.input_shape == (128,)


@pytest.mark.slow
def test_whole_real_sst2():
    task = open_task("sst2", data=shared_data("sst2"))
    assert [task.size(split) for split in task.splits] == [60614, 6735, 872]
