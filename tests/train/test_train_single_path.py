"""A step by single paths is the step of the path's own network, and moves nothing else."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from archsmith.families.cells import NasBench201Family, random_path
from archsmith.train.single_path import train_single_path

FAMILY = NasBench201Family(image=(3, 8, 8), num_classes=4, channels=2, cells=1)
BATCH = (torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 0, 1]))


def test_one_step_is_the_step_of_the_extracted_network():
    supernet = FAMILY.supernet(seed=0, affine=True)
    before = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    cell = random_path(np.random.default_rng(5))
    alone = supernet.extract(cell).train()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    loss = F.cross_entropy(alone(BATCH[0]), BATCH[1])
    loss.backward()
    optimizer.step()

    shared = torch.optim.SGD(supernet.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    losses = train_single_path(supernet, [BATCH], shared, random_path, rng=np.random.default_rng(5))

    assert np.allclose(losses, [float(loss.detach())])
    for name, tensor in supernet.extract(cell).state_dict().items():
        torch.testing.assert_close(tensor, alone.state_dict()[name])
    for name, tensor in supernet.state_dict().items():
        edge, inside, rest = name.partition(".candidates.")
        if inside and not rest.startswith(supernet.get_submodule(edge).active + "."):
            assert torch.equal(tensor, before[name]), name


def test_every_batch_has_a_path_of_its_own_and_a_scheduler_step():
    supernet = FAMILY.supernet(seed=0)
    drawn = []

    def sample(rng):
        drawn.append(random_path(rng))
        return drawn[-1]

    optimizer = torch.optim.SGD(supernet.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    rng = np.random.default_rng(0)
    losses = train_single_path(supernet, [BATCH] * 4, optimizer, sample, rng=rng, scheduler=scheduler)
    assert len(losses) == len(set(drawn)) == 4
    assert optimizer.param_groups[0]["lr"] < 1e-12


def test_the_same_streams_give_the_same_weights():
    def trained():
        supernet = FAMILY.supernet(seed=3)
        optimizer = torch.optim.SGD(supernet.parameters(), lr=0.1, momentum=0.9)
        train_single_path(supernet, [BATCH] * 3, optimizer, random_path, rng=np.random.default_rng(1))
        return supernet.state_dict()

    first, again = trained(), trained()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
