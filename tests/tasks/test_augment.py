from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from archsmith.core.errors import UserError
from archsmith.tasks.augment import (
    Augment,
    augmented,
    changed_augment,
    cutout,
    mixup,
    random_crop,
    random_flip,
    smoothed_cross_entropy,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(batch=64, channels=2, height=6, width=5):
    """Images whose pixels all differ and are never zero."""
    return torch.arange(1.0, batch * channels * height * width + 1).reshape(batch, channels, height, width)


def test_label_smoothing_golden():
    # Closed form: -sum_k (0.9 [k = target] + 0.1 / 4) log softmax(logits)_k.
    logits = torch.tensor([[1, 2, 0, -1], [0, 0, 3, 1]], dtype=torch.float64)
    losses = smoothed_cross_entropy(logits, torch.tensor([1, 2]), smoothing=0.1)
    assert losses.tolist() == pytest.approx([0.5901896985611954, 0.4109976232381757], abs=1e-9)


def test_label_smoothing_of_probabilities_equals_that_of_classes():
    logits = torch.randn(8, 5, generator=generator(), dtype=torch.float64)
    classes = torch.arange(8) % 5
    soft = torch.nn.functional.one_hot(classes, 5).double()
    assert torch.allclose(
        smoothed_cross_entropy(logits, classes, smoothing=0.2),
        smoothed_cross_entropy(logits, soft, smoothing=0.2),
        atol=1e-12,
    )


@given(seed=st.integers(0, 1000), padding=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_crop_equals_the_literal_version(seed, padding):
    images, fill = numbered(batch=5), torch.tensor([-1.0, -2.0])
    found = random_crop(images, padding, generator(seed), fill=fill)
    offsets = torch.randint(0, 2 * padding + 1, (2, 5), generator=generator(seed))
    for image, result, down, right in zip(images, found, *offsets.tolist(), strict=True):
        padded = np.stack(
            [
                np.pad(channel, padding, constant_values=float(value))
                for channel, value in zip(image.numpy(), fill, strict=True)
            ]
        )
        assert np.array_equal(result.numpy(), padded[:, down : down + 6, right : right + 5])


def test_crop_uses_every_offset_and_its_own_for_each_image():
    images = torch.zeros(2000, 1, 5, 5)
    images[:, :, 2, 2] = 1.0
    places = random_crop(images, 2, generator()).flatten(1).argmax(1)
    counts = torch.bincount(places, minlength=25).double()
    # 25 places of probability 1/25: 4 standard errors are 4 sqrt(2000 * 0.04 * 0.96).
    assert float((counts - 80).abs().max()) < 4 * (2000 * 0.04 * 0.96) ** 0.5


def test_crop_without_fill_moves_zeros_in_and_keeps_the_memory_format():
    images = numbered(batch=8).contiguous(memory_format=torch.channels_last)
    found = random_crop(images, 2, generator(1))
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, random_crop(images.contiguous(), 2, generator(1)))
    assert random_crop(images.contiguous(), 2, generator(1)).is_contiguous()
    assert float(found.min()) == 0.0


def test_flip_mirrors_about_half_of_the_images():
    images = numbered(batch=1000)
    found = random_flip(images, generator())
    mirrored = (found == images.flip(3)).flatten(1).all(1)
    kept = (found == images).flatten(1).all(1)
    assert torch.equal(mirrored, ~kept)
    assert abs(int(mirrored.sum()) - 500) < 4 * 250**0.5


def test_cutout_clears_one_square_around_a_uniform_centre():
    images = numbered(batch=3000, channels=1, height=7, width=7)
    gone = cutout(images, 3, generator()) == 0
    rows, columns = gone[:, 0].any(2).sum(1), gone[:, 0].any(1).sum(1)
    assert torch.equal(gone[:, 0].flatten(1).sum(1), rows * columns)
    assert set(rows.tolist()) == {2, 3}  # cut at the borders, never wrapped around
    # The corner is cleared by 4 of the 49 centres.
    assert abs(int(gone[:, 0, 0, 0].sum()) - 3000 * 4 / 49) < 4 * (3000 * (4 / 49) * (45 / 49)) ** 0.5
    assert torch.equal(cutout(images, 3, generator())[~gone], images[~gone])


def test_mixup_mixes_inputs_and_targets_in_the_same_proportion():
    classes = torch.arange(6)
    images = torch.nn.functional.one_hot(classes, 6).float().reshape(6, 6, 1, 1)
    mixed, soft = mixup(images, classes, alpha=1.0, num_classes=6, generator=generator(3))
    assert torch.allclose(mixed.flatten(1), soft)
    assert torch.allclose(soft.sum(1), torch.ones(6))
    share = float(soft[0, 0])
    assert 0 < share < 1
    assert all(torch.isclose(row.max(), torch.tensor(max(share, 1 - share))) or row.max() == 1 for row in soft)


def test_mixup_shares_follow_the_beta_distribution():
    images, classes = torch.zeros(2, 1, 1, 1), torch.tensor([0, 1])
    shares = []
    for seed in range(600):
        _, soft = mixup(images, classes, alpha=0.5, num_classes=2, generator=generator(seed))
        shares.append(float(soft[0].max()))
    # E max(l, 1 - l) of Beta(1/2, 1/2) is 1/2 + 1/pi; half of the permutations mix an example with itself (share 1).
    expected = 0.5 + 0.5 * (0.5 + 1 / np.pi)
    assert abs(np.mean(shares) - expected) < 4 * np.std(shares) / 600**0.5


@pytest.mark.parametrize("change", [{"crop": 1}, {"flip": True}, {"cutout": 2}, {"mixup": 0.3}])
def test_each_setting_acts_alone_and_draws_the_same_for_any_content(change):
    images, classes = numbered(), torch.arange(64) % 3
    states = []
    for inputs in (images, torch.zeros_like(images)):
        source = generator(5)
        found, _ = augmented(
            inputs, classes, augment=Augment(**change), num_classes=3, fill=torch.zeros(2), generator=source
        )
        states.append(source.get_state())
        assert torch.equal(found, inputs) == (inputs is not images)
    assert torch.equal(*states)
    assert not torch.equal(states[0], generator(5).get_state())


def test_no_setting_changes_nothing_and_draws_nothing():
    images, classes, source = numbered(), torch.arange(64) % 3, generator(5)
    found, targets = augmented(images, classes, augment=Augment(), num_classes=3, fill=torch.zeros(2), generator=source)
    assert found is images and targets is classes
    assert torch.equal(source.get_state(), generator(5).get_state())


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"crop": -1}, "crop: got -1; allowed: a whole number from 0 to 256"),
        ({"crop": 1.5}, "crop: got 1.5"),
        ({"crop": True}, "crop: got True"),
        ({"flip": 1}, "flip: got 1; allowed: true or false"),
        ({"cutout": "4"}, "cutout: got '4'"),
        ({"mixup": float("nan")}, "mixup: got nan; allowed: a number from 0 to 16"),
        ({"label_smoothing": 1.0}, r"label_smoothing: got 1.0; allowed: a number from 0 to 0.99"),
    ],
)
def test_settings_out_of_bounds(wrong, text):
    with pytest.raises(UserError, match=text):
        Augment(**wrong)


def test_settings_that_do_not_fit_the_image():
    assert Augment(crop=3, cutout=7).fitting(8, 8) == Augment(crop=3, cutout=7)
    with pytest.raises(UserError, match="crop: got 4; allowed: less than half of the image, 0 to 3 at 8x9"):
        Augment(crop=4).fitting(8, 9)
    with pytest.raises(UserError, match="cutout: got 8; allowed: less than the image, 0 to 7 at 8x8"):
        Augment(cutout=8).fitting(8, 8)


def test_augmentation_is_changed_inside_a_block_only():
    task = SimpleNamespace(augment=Augment(crop=1))
    with changed_augment(task, mixup=0.3):
        assert task.augment == Augment(crop=1, mixup=0.3)
    with pytest.raises(KeyError), changed_augment(task, mixup=0.3):
        raise KeyError
    assert task.augment == Augment(crop=1)
    with changed_augment(object()):
        pass
    with (
        pytest.raises(UserError, match=r"task: got 'object'; allowed: a task with `augment`"),
        changed_augment(object(), mixup=1),
    ):
        pass
    with pytest.raises(UserError, match="mixup: got -1"), changed_augment(task, mixup=-1):
        pass
