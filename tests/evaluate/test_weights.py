import pickle
from pathlib import Path

import pytest
import torch

from archsmith.core.errors import UserError
from archsmith.evaluate.base import WeightStore
from archsmith.evaluate.weights import FolderWeightStore, MemoryWeightStore, content_key

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "steps": torch.tensor(7), "half": torch.ones(3).bfloat16()}


@pytest.fixture(params=["memory", "folder"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> WeightStore:
    return MemoryWeightStore() if request.param == "memory" else FolderWeightStore(tmp_path / "weights")


def test_what_was_put_comes_back(store: WeightStore) -> None:
    assert isinstance(store, WeightStore)
    key = store.put(TENSORS)
    assert len(key) == 64 and store.put(dict(reversed(TENSORS.items()))) == key
    found = store.get(key)
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
    with pytest.raises(KeyError):
        store.get("0" * 64)
    with pytest.raises(KeyError):
        store.get("../secret")


def test_later_changes_do_not_reach_the_store() -> None:
    store, weights = MemoryWeightStore(), {"w": torch.zeros(2)}
    key = store.put(weights)
    weights["w"] += 1
    store.get(key)["w"].add_(5)
    assert store.get(key)["w"].tolist() == [0.0, 0.0]


def test_keys_depend_on_content_and_not_on_layout() -> None:
    key = content_key(TENSORS)
    image = torch.randn(2, 3, 4, 5)
    assert content_key({"x": image}) == content_key({"x": image.contiguous(memory_format=torch.channels_last)})
    others = [
        {**TENSORS, "steps": torch.tensor(8)},
        {**TENSORS, "steps": torch.tensor(7.0)},
        {**TENSORS, "a.weight": torch.arange(6.0)},
        {("b" if name == "half" else name): tensor for name, tensor in TENSORS.items()},
    ]
    assert len({key, *map(content_key, others)}) == 5


def test_processes_share_a_folder_and_damage_is_named(tmp_path: Path) -> None:
    store = FolderWeightStore(tmp_path)
    key = store.put(TENSORS)
    again = pickle.loads(pickle.dumps(store))  # noqa: S301
    assert key in again and torch.equal(again.get(key)["steps"], TENSORS["steps"])
    path = tmp_path / f"{key}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match="whose content is not what its name says"):
        again.get(key)
    path.write_bytes(b"short")
    with pytest.raises(UserError, match="whose content is not what its name says"):
        again.get(key)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"weights: got .*file"):
        FolderWeightStore(tmp_path / "file" / "below").put(TENSORS)
