import numpy as np
import pytest
import torch
from shared_data import shared_data
from spoken_samples import SPEAKERS, spoken, write_spoken_digits, write_wav

from archsmith.core.errors import UserError
from archsmith.families.tdnn import TdnnFamily
from archsmith.tasks import open_task, task_table
from archsmith.tasks.ctc import greedy_decoded
from archsmith.tasks.spoken_digits import PHONES, WORDS, loudest, read_recordings, spelling
from archsmith.testing.tasks import TaskContract

OPTIONS = {"bands": 8, "seconds": 0.7}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_spoken_digits(tmp_path_factory.mktemp("digits"))


class TestSpokenDigits(TaskContract):
    target_axes = 2

    @pytest.fixture
    def make_task(self, folder):
        return lambda: open_task("spoken-digits", data=folder, **OPTIONS)

    def weight(self, task):
        planes, bands, _ = task.input_shape
        generator = torch.Generator().manual_seed(0)
        return torch.randn(planes * bands, task.num_classes, generator=generator) * 0.1

    def forward(self, weight):
        return lambda inputs: inputs.flatten(1, 2).mT @ weight

    def outputs(self, batch, task):
        return (batch, task.input_shape[2], task.num_classes)

    def literal_scores(self, task, forward):
        losses, right = [], []
        for batch in task.batches("valid", batch_size=1):
            length, count = int(batch.context["lengths"][0]), int(batch.context["target_lengths"][0])
            scores = forward(batch.inputs)[:, :length].double()
            target = batch.targets[0, :count]
            loss = torch.nn.functional.ctc_loss(scores.log_softmax(-1)[0], target, [length], [count], reduction="sum")
            losses.append(float(loss))
            right.append(greedy_decoded(scores, torch.tensor([length]))[0] == target.tolist())
        return {"accuracy": sum(right) / len(right), "loss": sum(losses) / len(losses)}


def test_it_is_listed():
    assert "spoken-digits" in {row["name"] for row in task_table()}


def test_every_word_is_spelled_in_phones_or_letters():
    tokens, spelled = spelling("phones")
    assert tokens[0] == "<blank>" and len(tokens) == 20
    assert [tokens[number] for number in spelled["six"]] == list(PHONES["six"])
    assert all(0 not in numbers for numbers in spelled.values())
    assert len(set(spelled.values())) == 10
    letters, spelled = spelling("letters")
    assert "".join(letters[number] for number in spelled["three"]) == "three" and len(letters) == 16


def test_batches_have_lengths_and_padding(folder):
    task = open_task("spoken-digits", data=folder, **OPTIONS)
    assert task.kind == "speech" and task.input_shape == (3, 8, 70)
    recordings = read_recordings(folder)
    indices = task.split_indices("test")
    for batch in task.batches("test", batch_size=16):
        for row in range(len(batch)):
            length, index = int(batch.context["lengths"][row]), indices[row]
            assert length == min(70, -(-len(recordings.waves[index]) // 80))
            assert not batch.inputs[row, :, :, length:].any() and batch.inputs[row, 0, :, length - 1].any()
            count = int(batch.context["target_lengths"][row])
            said = [task.class_names[token] for token in batch.targets[row, :count]]
            assert said == list(PHONES[WORDS[recordings.digits[index]]])
            assert not batch.targets[row, count:].any()
        indices = indices[len(batch) :]
    kept = [
        batch.inputs[row, 0, :, : batch.context["lengths"][row]]
        for batch in task.batches("train", batch_size=9)
        for row in range(9)
    ]
    values = torch.cat(kept, 1)
    assert abs(float(values.mean())) < 0.05 and abs(float(values.std()) - 1) < 0.05


def test_both_forms_of_the_data_are_the_same_task(folder, tmp_path):
    packed = write_spoken_digits(tmp_path / "packed", packed=True)
    first, second = (open_task("spoken-digits", data=path, **OPTIONS) for path in (folder, packed))
    assert first.digest == second.digest
    assert torch.equal(first.examples(20), second.examples(20))
    assert first.digest != open_task("spoken-digits", data=folder, bands=9, seconds=0.7).digest


def test_the_official_split_and_the_one_by_speakers(folder):
    recordings = read_recordings(folder)
    task = open_task("spoken-digits", data=folder, **OPTIONS)
    assert bool((recordings.indices[task.split_indices("test")] < 5).all())
    assert [task.size(part) for part in task.splits] == [80, 10, 150]
    assert sorted(recordings.digits[task.split_indices("valid")]) == list(range(10))
    task = open_task("spoken-digits", data=folder, split="speakers", limit=4, **OPTIONS)
    heard = {part: {recordings.speakers[i] for i in task.split_indices(part)} for part in task.splits}
    assert heard == {"train": {SPEAKERS[0]}, "valid": {SPEAKERS[1]}, "test": {SPEAKERS[2]}}
    assert task.size("train") == 40


def test_parts_can_be_exchanged_and_halved(folder):
    task = open_task("spoken-digits", data=folder, **OPTIONS)
    first, second = task.training_halves(3)
    joined = np.concatenate([half.split_indices("train") for half in (first, second)])
    assert np.array_equal(np.sort(joined), task.split_indices("train"))
    assert np.array_equal(first.split_indices("valid"), task.split_indices("valid"))
    assert first.normalisation == task.normalisation
    moved = task.with_splits({"valid": task.split_indices("test")})
    assert moved.size("valid") == task.size("test") and task.size("valid") == 10


def test_the_loudest_stretch_is_taken():
    samples = np.array([0, 1, -5, 5, 1, 0, 0], np.int16)
    assert loudest(samples, 2).tolist() == [-5, 5] and loudest(samples, 9) is samples
    assert loudest(np.full(5, -32768, np.int16), 2).tolist() == [-32768] * 2  # squares do not overflow


def test_a_small_network_learns_the_tones(folder):
    task = open_task("spoken-digits", data=folder, **OPTIONS)
    family = TdnnFamily(
        image=task.input_shape, num_classes=task.num_classes, width=24, blocks=2, stride_after=1, dropout=0.0
    )
    network = family.build(family.largest(), seed=0)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for epoch in range(30):
        for batch in task.batches("train", batch_size=16, epoch=epoch):
            loss, _ = task.loss(network, batch, torch.Generator())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    scores = task.evaluate(network.eval(), "test")
    assert scores["accuracy"] > 0.8 and scores["token_error_rate"] < 0.1


def test_wrong_data_and_options_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="data: got None; allowed: the folder with the recordings"):
        open_task("spoken-digits")
    with pytest.raises(UserError, match=r"allowed: a folder with <digit>_<speaker>_<index>\.wav"):
        open_task("spoken-digits", data=tmp_path)
    with pytest.raises(UserError, match="option of task spoken-digits: got 'crop'; allowed: split, units"):
        open_task("spoken-digits", data=folder, crop=2)
    with pytest.raises(UserError, match="units: got 'words'; allowed: phones, letters"):
        open_task("spoken-digits", data=folder, units="words")
    for name, content in (("3_ada_0.wav", b"RIFF"), ("3_ada_0.wav", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=r"3_ada_0\.wav.*readable WAV file"):
            open_task("spoken-digits", data=tmp_path)
    write_wav(tmp_path / "3_ada_0.wav", spoken(3, 0, 0), channels=2)
    with pytest.raises(UserError, match="16 bits, mono"):
        open_task("spoken-digits", data=tmp_path)
    write_wav(tmp_path / "3_ada_0.wav", spoken(3, 0, 0))
    with pytest.raises(UserError, match="indices 0 to 0"):
        open_task("spoken-digits", data=tmp_path)
    with pytest.raises(UserError, match="this needs 3"):
        open_task("spoken-digits", data=tmp_path, split="speakers")
    (tmp_path / "recordings.tsv").write_text("file\n")
    with pytest.raises(UserError, match=r"readable recordings\.tsv"):
        open_task("spoken-digits", data=tmp_path)


def test_the_real_recordings():
    task = open_task("spoken-digits", data=shared_data("fsdd"))
    assert task.input_shape == (3, 40, 100)
    assert [task.size(part) for part in task.splits] == [1080, 120, 300]
    # The shortest recordings hold their phones at a third of the frame rate.
    task.evaluate(lambda inputs: inputs.new_zeros(len(inputs), 34, 20), "train")
