import numpy as np
import pytest
import torch
from image_samples import random_images

from archsmith.core.errors import UserError
from archsmith.tasks import Augment, Batch, ImageClassification
from archsmith.tasks.vision import channel_statistics


def task(n=90, shape=(2, 6, 6), **options):
    x, y = random_images(n, shape)
    return ImageClassification.from_arrays(x, y, **options)


def joined(batches):
    return torch.cat([batch.inputs for batch in batches])


def test_normalisation_is_that_of_the_training_part_alone():
    x, y = random_images(90, (2, 6, 6))
    x[:, 1] //= 3
    made = ImageClassification.from_arrays(x, y)
    train = x[made.split_indices("train")] / 255
    assert made.normalisation["mean"] == pytest.approx(train.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert made.normalisation["std"] == pytest.approx(train.std((0, 2, 3)).tolist(), abs=1e-12)
    others = x.copy()
    for part in ("valid", "test"):
        others[made.split_indices(part)] = 7
    assert ImageClassification.from_arrays(others, y).normalisation == made.normalisation


def test_inputs_are_the_images_normalised():
    x, y = random_images(90, (2, 6, 6))
    made = ImageClassification.from_arrays(x, y)
    mean, std = (np.array(made.normalisation[key])[:, None, None] for key in ("mean", "std"))
    expected = (x[made.split_indices("test")] / 255 - mean) / std
    assert np.allclose(made.examples(made.size("test")).numpy(), expected, atol=1e-5)
    batch = next(made.batches("valid", batch_size=4))
    assert batch.targets.tolist() == y[made.split_indices("valid")][:4].tolist()
    assert dict(batch.context) == {}


def test_every_training_image_comes_once_per_epoch_with_its_label():
    x = np.arange(90, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), np.uint8)
    made = ImageClassification.from_arrays(x, np.arange(90) % 3)
    mean, std = made.normalisation["mean"][0], made.normalisation["std"][0]
    found = []
    for batch in made.batches("train", batch_size=1, seed=4):
        number = round(float(batch.inputs[0, 0, 0, 0] * std + mean) * 255)
        assert number % 3 == int(batch.targets)
        found.append(number)
    assert sorted(found) == made.split_indices("train").tolist()
    assert found != sorted(found)


def test_floats_and_bytes_of_the_same_images_give_the_same_inputs():
    x, y = random_images(90, (6, 6))
    one, two = ImageClassification.from_arrays(x, y), ImageClassification.from_arrays((x / 255).astype(np.float32), y)
    assert torch.allclose(one.examples(9), two.examples(9), atol=1e-5)
    assert one.digest != two.digest


def test_channels_last_changes_the_layout_only():
    plain, last = (
        task(augment=Augment(crop=1, flip=True, cutout=2)),
        task(augment=Augment(crop=1, flip=True, cutout=2), channels_last=True),
    )
    seen = []
    for made in (plain, last):
        batch = next(made.batches("train", batch_size=8))
        made.loss(lambda x: seen.append(x) or torch.zeros(8, 3), batch, torch.Generator().manual_seed(0))
    assert torch.equal(*seen)
    assert seen[0].is_contiguous() and not seen[0].is_contiguous(memory_format=torch.channels_last)
    assert seen[1].is_contiguous(memory_format=torch.channels_last) and not seen[1].is_contiguous()
    assert plain.digest == last.digest


def test_black_moves_in_at_the_borders():
    x = np.full((60, 1, 6, 6), 200, np.uint8)
    x[::2] = 100
    made = ImageClassification.from_arrays(x, np.arange(60) % 2, augment=Augment(crop=2))
    seen = []
    batch = next(made.batches("train", batch_size=32))
    made.loss(lambda inputs: seen.append(inputs) or torch.zeros(32, 2), batch, torch.Generator().manual_seed(0))
    pixels = seen[0] * made.normalisation["std"][0] + made.normalisation["mean"][0]
    assert sorted(set((pixels * 255).round().flatten().tolist())) == [0, 100, 200]


def test_loss_is_the_smoothed_mean_and_accuracy_counts_the_larger_share():
    made = task(augment=Augment(label_smoothing=0.1, mixup=1.0))
    batch = next(made.batches("train", batch_size=32))
    logits = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    loss, metrics = made.loss(lambda x: logits, batch, torch.Generator().manual_seed(4))
    from archsmith.tasks.augment import mixup

    source = torch.Generator().manual_seed(4)
    _, soft = mixup(batch.inputs, batch.targets, alpha=1.0, num_classes=3, generator=source)
    target = 0.9 * soft.double() + 0.1 / 3
    expected = -(target * logits.double().log_softmax(1)).sum(1).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert float(metrics["accuracy"]) == pytest.approx(float((logits.argmax(1) == soft.argmax(1)).float().mean()))


def test_evaluation_neither_augments_nor_smooths():
    plain, other = task(), task(augment=Augment(crop=2, flip=True, label_smoothing=0.3))

    def forward(inputs):
        return inputs.flatten(1)[:, :3]

    assert plain.evaluate(forward, "valid") == other.evaluate(forward, "valid")


def test_digest_sees_pixels_labels_split_and_size():
    x, y = random_images(90, (8, 8))
    reference = ImageClassification.from_arrays(x, y).digest
    assert ImageClassification.from_arrays(x.copy(), y.astype(np.uint8)).digest == reference
    other = x.copy()
    other[5, 3, 3] ^= 1
    changed = [
        ImageClassification.from_arrays(other, y),
        ImageClassification.from_arrays(x, y[::-1].copy()),
        ImageClassification.from_arrays(x, y, valid_fraction=0.2),
        ImageClassification.from_arrays(x, y, name="other"),
        ImageClassification.from_arrays(x, y, resolution=4),
        ImageClassification.from_arrays(x, y, resolution=4, resample="bilinear"),
    ]
    digests = {reference, *(made.digest for made in changed)}
    assert len(digests) == 7
    assert ImageClassification.from_arrays(x, y, resolution=8).digest == reference
    assert ImageClassification.from_arrays(x, y, augment=Augment(flip=True)).digest == reference


def test_given_parts_are_used():
    x, y = random_images(90, (8, 8))
    made = ImageClassification.from_arrays(
        x[:60],
        y[:60],
        x_valid=x[60:70],
        y_valid=y[60:70],
        x_test=x[70:],
        y_test=y[70:],
        class_names=("a", "b", "c"),
        resolution=4,
    )
    assert [made.size(split) for split in made.splits] == [60, 10, 20]
    assert made.input_shape == (1, 4, 4) and made.class_names == ("a", "b", "c")


def test_constant_channel_becomes_zero():
    x, y = random_images(90, (2, 6, 6))
    x[:, 1] = 9
    made = ImageClassification.from_arrays(x, y)
    assert made.normalisation["std"][1] == 1.0
    assert torch.isfinite(made.examples(5)).all() and float(made.examples(5)[:, 1].abs().max()) < 1e-6


def test_statistics_in_pieces_equal_those_of_the_whole():
    x, _ = random_images(3000, (3, 4, 4))
    mean, std = channel_statistics(x, np.arange(0, 3000, 2))
    assert np.allclose(mean, x[::2].mean((0, 2, 3)) / 255, atol=1e-12)
    assert np.allclose(std, x[::2].std((0, 2, 3)) / 255, atol=1e-12)


def test_batch_moves_its_context():
    batch = Batch(torch.zeros(2, 1), torch.zeros(2), {"length": torch.ones(2), "name": "x"})
    moved = batch.to("meta")
    assert len(batch) == 2
    assert {moved.inputs.device.type, moved.targets.device.type, moved.context["length"].device.type} == {"meta"}
    assert moved.context["name"] == "x"
    with pytest.raises(AttributeError):
        batch.inputs = None


def test_fewer_images_than_the_batch():
    made = task(n=90)
    assert made.steps_per_epoch(made.size("train")) == 1
    text = f"batch_size: got 100; allowed: 1 to {made.size('train')}, the size of the training part of arrays"
    with pytest.raises(UserError, match=text):
        made.steps_per_epoch(100)
    with pytest.raises(UserError, match=text):
        made.batches("train", batch_size=100)


def test_wrong_arguments():
    x, y = random_images(30, (6, 6))
    with pytest.raises(UserError, match="y_test: got None; allowed: both x_test and y_test, or none"):
        ImageClassification.from_arrays(x, y, x_test=x)
    with pytest.raises(UserError, match="resolution: got 3; allowed: a whole number from 4 to 1024"):
        ImageClassification.from_arrays(x, y, resolution=3)
    with pytest.raises(UserError, match="resample: got 'cubic'; allowed: auto, area, bilinear"):
        ImageClassification.from_arrays(x, y, resolution=4, resample="cubic")
    with pytest.raises(UserError, match="crop: got 3; allowed: less than half of the image, 0 to 2 at 6x6"):
        ImageClassification.from_arrays(x, y, augment=Augment(crop=3))
    with pytest.raises(UserError, match="network output: got a list; allowed: logits of shape"):
        task().evaluate(lambda inputs: [1], "valid")
