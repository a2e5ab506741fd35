import random

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, TensorDataset

from archsmith.core.errors import UserError
from archsmith.tasks import LoaderTask


class Noisy(Dataset):
    """A dataset whose transforms draw from all three global streams."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        image = torch.full((1, 4, 4), float(index)) + torch.rand(1) + random.random() + float(np.random.rand())
        return image, index % 3


def plain(n=21):
    return TensorDataset(torch.arange(n * 16.0).reshape(n, 1, 4, 4), torch.arange(n) % 3)


def made(train=None, valid=None, test=None, **options):
    train = train if train is not None else DataLoader(plain(), batch_size=4, shuffle=True)
    valid = valid if valid is not None else DataLoader(plain(), batch_size=8)
    return LoaderTask(train, valid, test, num_classes=3, **options)


def epoch(task, **arguments):
    return torch.cat([b.inputs for b in task.batches("train", batch_size=4, **arguments)])


def elsewhere():
    """A generator whose state nobody can foresee."""
    generator = torch.Generator()
    generator.seed()
    return generator


LOADERS = {
    "shuffled": lambda: DataLoader(Noisy(21), batch_size=4, shuffle=True),
    "own generator": lambda: DataLoader(Noisy(21), batch_size=4, shuffle=True, generator=elsewhere()),
    "sampler": lambda: DataLoader(Noisy(21), batch_size=4, sampler=RandomSampler(range(21), replacement=True)),
    "batch sampler": lambda: DataLoader(Noisy(21), batch_sampler=BatchSampler(RandomSampler(range(21)), 4, True)),
    "workers": lambda: DataLoader(Noisy(21), batch_size=4, shuffle=True, num_workers=1),
}


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS.keys())
def test_random_transforms_resume_exactly_whatever_the_global_streams_did(make):
    torch.manual_seed(1)
    task = made(make())
    assert task.resume_note == ""
    whole = epoch(task, seed=5, epoch=1)
    torch.manual_seed(2), random.seed(3), np.random.seed(4)
    assert torch.equal(epoch(made(make()), seed=5, epoch=1, start=3), whole[12:])
    assert not torch.equal(epoch(made(make()), seed=5, epoch=2), whole)
    assert not torch.equal(epoch(made(make()), seed=6, epoch=1), whole)


def test_training_between_batches_does_not_move_the_loader_nor_the_other_way():
    def disturbed(reseed):
        torch.manual_seed(0)
        found, seen = [], []
        for batch in made(LOADERS["shuffled"]()).batches("train", batch_size=4):
            found.append(batch.inputs)
            seen.append((float(torch.rand(())), random.random(), float(np.random.rand())))
            if reseed:
                torch.rand(100)
        return torch.cat(found), seen

    random.seed(0), np.random.seed(0)
    one, seen = disturbed(False)
    random.seed(0), np.random.seed(0)
    two, _ = disturbed(True)
    assert torch.equal(one, two)
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    assert seen == [(float(torch.rand(())), random.random(), float(np.random.rand())) for _ in seen]


class EpochSampler(Sampler):
    """Orders by the epoch it is told, as a distributed sampler does."""

    def __init__(self):
        self.epoch = 0

    def __len__(self):
        return 21

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter(np.random.default_rng(self.epoch).permutation(21).tolist())


def test_sampler_with_set_epoch_is_told_the_epoch():
    def loader():
        return DataLoader(plain(), batch_size=4, sampler=EpochSampler())

    task = made(loader())
    assert task.resume_note == ""
    whole = epoch(task, epoch=3)
    assert not torch.equal(whole, epoch(task, epoch=4))
    assert torch.equal(epoch(made(loader()), epoch=3, start=2), whole[8:])


class Stateful:
    """A loader with an order of its own that goes on from epoch to epoch, and a state to store it."""

    batch_size = 4

    def __init__(self):
        self.random = np.random.default_rng(9)
        self.left = []

    def __len__(self):
        return 6

    def state_dict(self):
        return {"random": self.random.bit_generator.state, "left": list(self.left)}

    def load_state_dict(self, state):
        self.random.bit_generator.state = state["random"]
        self.left = list(state["left"])
        self.loaded = True

    def __iter__(self):
        if not getattr(self, "loaded", False):
            self.left = self.random.permutation(21).tolist()
        self.loaded = False
        data = plain().tensors
        while self.left:
            chosen, self.left = self.left[:4], self.left[4:]
            yield data[0][chosen], data[1][chosen]


@pytest.mark.parametrize("stop", [0, 1, 3, 5])
def test_loader_with_state_resumes_from_its_state(stop):
    task = made(Stateful())
    assert task.resume_note == ""
    epoch(task, epoch=0)
    batches, state = task.batches("train", batch_size=4, epoch=1), task.state_dict()
    before = []
    for _ in range(stop):
        before.append(next(batches).inputs)
        state = task.state_dict()
    rest = torch.cat([*(b.inputs for b in batches), torch.zeros(0, 1, 4, 4)])
    after = epoch(task, epoch=2)

    fresh = made(Stateful())
    fresh.load_state_dict(state)
    if stop < 5:
        assert torch.equal(epoch(fresh, epoch=1, start=stop), rest)
    assert torch.equal(epoch(fresh, epoch=2), after)


def test_loader_with_state_refuses_to_go_on_without_it():
    with pytest.raises(
        UserError, match=r"train loader: got epoch 1, step 0 .*allowed: continuing from a stored state.*load_state_dict"
    ):
        made(Stateful()).batches("train", batch_size=4, epoch=1)
    task = made(Stateful())
    next(task.batches("train", batch_size=4))
    state, fresh = task.state_dict(), made(Stateful())
    fresh.load_state_dict(state)
    with pytest.raises(
        UserError, match="start: got epoch 0, step 2; allowed: epoch 0, step 1, where the state was taken"
    ):
        fresh.batches("train", batch_size=4, start=2)


class Shuffler(Sampler):
    def __init__(self):
        self.random = np.random.default_rng()

    def __len__(self):
        return 21

    def __iter__(self):
        return iter(self.random.permutation(21).tolist())


class Stream(IterableDataset):
    def __len__(self):
        return 21

    def __iter__(self):
        yield from plain()


@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(plain(), batch_size=4, sampler=Shuffler()),
        lambda: DataLoader(plain(), batch_sampler=[[0, 1, 2, 3], [4, 5, 6, 7]]),
        lambda: DataLoader(Stream(), batch_size=4),
        lambda: DataLoader(plain(), batch_size=4, shuffle=True, num_workers=1, persistent_workers=True),
        lambda: [(torch.zeros(4, 1, 4, 4), torch.zeros(4, dtype=torch.int64))] * 2,
    ],
    ids=["sampler", "batch list", "stream", "persistent", "list"],
)
def test_orders_that_cannot_be_seeded_are_announced(loader):
    task = made(loader())
    assert "resumes at epoch starts" in task.resume_note
    assert task.state_dict() == {}
    assert len(list(task.batches("train", batch_size=4))) == task.steps_per_epoch(4) >= 2


def test_sizes_and_parts():
    task = made(valid=DataLoader(Stream(), batch_size=8), test=DataLoader(plain(10), batch_size=4))
    assert [task.size(split) for split in task.splits] == [21, 21, 10]
    assert task.steps_per_epoch(4) == 5
    assert task.examples(9, "valid").shape == (9, 1, 4, 4)
    pair = made()
    with pytest.raises(UserError, match=r"split: got 'test'; allowed: train, valid. give LoaderTask a third loader"):
        pair.evaluate(lambda x: x, "test")
    with pytest.raises(UserError, match="split: got 'test'"):
        pair.examples(1)


def test_digest_sees_the_structure_or_is_given():
    assert made().digest != made(valid=DataLoader(plain(99), batch_size=8)).digest
    assert made(digest="0" * 64).digest == "0" * 64


def test_normalisation_is_recorded_and_black_follows_from_it():
    task = made(normalisation={"mean": [0.5], "std": [0.25]})
    assert task.normalisation == {"mean": [0.5], "std": [0.25]}
    assert made().normalisation == {"mean": [0.0], "std": [1.0]}
    with pytest.raises(UserError, match=r"normalisation: got .*; allowed: mean and positive std, 1 numbers each"):
        made(normalisation={"mean": [0.5, 1.0], "std": [0.25, 1.0]})


def loader_of(inputs, targets):
    return [(inputs, targets)]


@pytest.mark.parametrize(
    ("valid", "text"),
    [
        (5, "valid loader: got int; allowed: a DataLoader"),
        ([], "valid loader: got no batch"),
        ([torch.zeros(2)], "valid loader: got batches of type Tensor; allowed: pairs"),
        (loader_of(torch.zeros(2, 1, 4, 4).double(), torch.zeros(2).long()), "got inputs torch.float64 .2, 1, 4, 4."),
        (loader_of(torch.zeros(2, 16), torch.zeros(2).long()), r"inputs torch.float32 \(2, 16\)"),
        (loader_of(torch.zeros(2, 1, 4, 4), torch.zeros(2)), "targets torch.float32"),
        (
            DataLoader(plain(), batch_size=4, drop_last=True),
            "valid loader: got drop_last=True; allowed: drop_last=False",
        ),
    ],
)
def test_wrong_loaders(valid, text):
    with pytest.raises(UserError, match=text):
        made(valid=valid)


def test_wrong_content_is_found_while_reading():
    task = made(valid=[(torch.zeros(2, 1, 4, 4), torch.tensor([0, 3]))])
    with pytest.raises(UserError, match="valid loader: got targets from 0 to 3; allowed: 0 to 2"):
        list(task.batches("valid", batch_size=2))
    task = made(train=[(torch.zeros(2, 1, 5, 5), torch.tensor([0, 1]))])
    with pytest.raises(UserError, match=r"train loader: got inputs of shape \(1, 5, 5\); allowed: \(1, 4, 4\)"):
        list(task.batches("train", batch_size=2))


def test_wrong_arguments():
    with pytest.raises(UserError, match="batch_size: got 5; allowed: 4, the batch size of the training loader"):
        made().batches("train", batch_size=5)
    with pytest.raises(UserError, match="batch_size: got 64; allowed: 1 to 21, the size of the training part"):
        made(train=DataLoader(plain(), batch_size=64)).steps_per_epoch(64)
    with pytest.raises(UserError, match=r"class_names: got .*; allowed: 3 names, one per class"):
        made(class_names=("a",))
    with pytest.raises(UserError, match="num_classes: got 1; allowed: a whole number from 2"):
        LoaderTask(DataLoader(plain()), DataLoader(plain()), num_classes=1)
