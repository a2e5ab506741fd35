"""Text files become batches of token ids: blocks of a text, or padded lines with their masks."""

import lzma

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from archsmith.core.errors import UserError
from archsmith.tasks.text_lines import TextOptions, open_tokenizer, text_batches


@pytest.fixture
def tokenizer(tmp_path):
    made = Tokenizer(models.WordLevel({"[UNK]": 0, **{f"w{i}": i + 1 for i in range(50)}}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    return open_tokenizer(tmp_path)


def test_running_text_is_cut_into_blocks_that_cover_it(tokenizer, tmp_path):
    ids = [i % 50 for i in range(64)]
    file = tmp_path / "text.txt.xz"
    file.write_bytes(lzma.compress(" ".join(f"w{i}" for i in ids).encode()))
    options = TextOptions(length=4, batch=2, train=9, valid=2)
    train, valid = text_batches("language-modelling", file, options, tokenizer)
    assert (len(train), len(valid)) == (6, 2)
    rows = torch.cat([batch["input_ids"] for batch in (*train, *valid)]).tolist()
    assert sorted(rows) == sorted([[i + 1 for i in ids[k : k + 4]] for k in range(0, 64, 4)])
    again, _ = text_batches("language-modelling", file, options, tokenizer)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(train, again, strict=True))


def test_lines_are_cut_off_and_padded_to_the_longest_of_their_batch(tokenizer, tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(" ".join(["w1"] * (1 + n % 6)) for n in range(16)) + "\n\n")
    train, valid = text_batches("sentences", file, TextOptions(length=4, batch=4, train=3, valid=1), tokenizer)
    for batch in (*train, *valid):
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        assert torch.equal(batch["input_ids"] > 0, batch["attention_mask"].bool())
        assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1] <= 4


def test_what_is_missing_or_too_short_is_named(tokenizer, tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("w1\n")
    with pytest.raises(UserError, match="1 lines; allowed: at least 40"):
        text_batches("sentences", file, TextOptions(batch=4, valid=8), tokenizer)
    with pytest.raises(UserError, match="--data FILE"):
        text_batches("sentences", None, TextOptions(), tokenizer)
    with pytest.raises(UserError, match="--task-set tokenizer=FOLDER"):
        open_tokenizer(None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="that can be read"):
        open_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"task\.length"):
        TextOptions(length=1)
