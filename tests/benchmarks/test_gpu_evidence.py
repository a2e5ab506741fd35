"""The scripts for a GPU, as far as a CPU can tell: packing, the plan of the runs, and (slow) a whole small trial."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "evidence"))
import gpu_cifar10
import gpu_data


def pictures(n_train=31, n_test=10, side=32):
    """Smooth coloured pictures of ten classes, as CIFAR-10 comes."""
    generator = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", n_train), ("test", n_test)):
        steps = generator.integers(0, 3, (n, 3, side, side))
        arrays[f"x_{part}"] = (steps.cumsum(2) + steps.cumsum(3)).astype(np.uint8)
        arrays[f"y_{part}"] = (np.arange(n) % 10).astype(np.uint8)
    return arrays


def saved(path, arrays):
    np.savez(path, **arrays)
    return path


def test_unpacking_gives_back_what_was_packed(tmp_path):
    arrays = pictures()
    source = saved(tmp_path / "all.npz", arrays)
    paths = gpu_data.pack(source, tmp_path / "packed")
    assert [path.name for path in paths] == list(gpu_data.NAMES)
    raw = sum(array.nbytes for array in arrays.values())
    assert sum(path.stat().st_size for path in paths) < 0.8 * raw
    gpu_data.unpack(tmp_path / "packed", tmp_path / "again.npz")
    with np.load(tmp_path / "again.npz") as again:
        for name, array in arrays.items():
            assert again[name].dtype == np.uint8
            assert np.array_equal(again[name], array), name


def test_noise_survives_packing_too():
    noise = np.random.default_rng(1).integers(0, 256, (5, 3, 7, 9)).astype(np.uint8)
    assert np.array_equal(gpu_data.decoded(gpu_data.encoded(noise), noise.shape), noise)


def test_channels_last_images_and_wide_labels_are_taken(tmp_path):
    arrays = pictures()
    turned = {k: np.moveaxis(v, 1, 3) if k[0] == "x" else v.astype(np.int64)[:, None] for k, v in arrays.items()}
    gpu_data.pack(saved(tmp_path / "all.npz", turned), tmp_path)
    gpu_data.unpack(tmp_path, tmp_path / "again.npz")
    with np.load(tmp_path / "again.npz") as again:
        assert all(np.array_equal(again[name], array) for name, array in arrays.items())


def test_halves_above_the_limit_are_not_written(tmp_path):
    source = saved(tmp_path / "all.npz", pictures())
    with pytest.raises(SystemExit, match=r"a half takes [\d,]+ bytes; allowed: 10,000"):
        gpu_data.pack(source, tmp_path / "packed", limit=10_000)
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("y_test"), "no y_test; x_train, y_train, x_test and y_test are needed"),
        (lambda a: a.update(x_train=a["x_train"].astype(np.float32)), r"x_train is float32 .* allowed: bytes"),
        (lambda a: a.update(y_train=a["y_train"][:-1]), "x_train is uint8"),
    ],
)
def test_other_arrays_are_refused(tmp_path, change, message):
    arrays = pictures()
    change(arrays)
    with pytest.raises(SystemExit, match=message):
        gpu_data.pack(saved(tmp_path / "all.npz", arrays), tmp_path)


def test_a_missing_half_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"cifar10-half-1.npz and cifar10-half-2.npz missing; make gpu-data"):
        gpu_data.unpack(tmp_path, tmp_path / "again.npz")


# --------------------------------------------------------------------- the runs


def trial(tmp_path, *more):
    """Options of a trial on the CPU."""
    data = tmp_path / "cifar10.npz"
    if not data.exists():
        saved(data, pictures(200, 20))
    cpu = ["--device", "cpu", "--precision", "float32", "--preset", "tiny", "--threads", "1"]
    wanted = ["--budgets", "0.5x", "0.3x", "--random", "1"]
    return ["--data", str(data), "--out", str(tmp_path / "out"), *cpu, *wanted, *more]


def test_the_runs_are_two_searches_their_rival_and_the_baselines(tmp_path):
    given = gpu_cifar10.parsed(trial(tmp_path, "--set", "epochs=1"))
    files = gpu_cifar10.write_configs(given.out, given)
    assert list(files) == ["atomnas-0.5x", "atomnas-0.3x", "equal-0.5x", "uniform-0.5x", "random-1-0.5x"]
    configs = {name: yaml.safe_load(file.read_text()) for name, file in files.items()}
    assert configs["atomnas-0.3x"]["budget"] == "macs<=0.3x"
    assert configs["equal-0.5x"]["settings"]["penalty"] == "equal"
    assert configs["uniform-0.5x"]["architecture"] != configs["random-1-0.5x"]["architecture"]
    assert all(config["settings"]["epochs"] == 1 for config in configs.values())
    assert all("device" not in config["runtime"] for config in configs.values())
    assert gpu_cifar10.write_configs(given.out, given) == files  # the same command again
    other = gpu_cifar10.parsed(trial(tmp_path, "--set", "epochs=2"))
    with pytest.raises(SystemExit, match="holds runs with other options"):
        gpu_cifar10.write_configs(other.out, other)


def test_a_gpu_is_asked_for_by_the_runtime(tmp_path):
    given = gpu_cifar10.parsed(["--data", "x.npz", "--out", str(tmp_path)])
    assert gpu_cifar10.base_config(given)["runtime"] == {"threads": 2, "device": "cuda", "precision": "bf16"}
    assert given.minutes <= 9


@pytest.mark.slow
def test_a_trial_stops_in_time_goes_on_and_ends_with_the_table(tmp_path, capsys, monkeypatch):
    options = trial(tmp_path, "--set", "epochs=1", "--set", "batch_size=32", "--set", "warmup_epochs=0.5")
    options += ["--set", "lr_warmup_epochs=0.5", "--processes", "2"]
    monkeypatch.setattr(gpu_cifar10, "SPARE_SECONDS", 0.0)
    gpu_cifar10.main([*options, "--minutes", "0.001"])
    assert "type the same command again" in capsys.readouterr().out
    gpu_cifar10.main([*options, "--minutes", "9"])
    text = capsys.readouterr().out
    assert text.count("| finished |") == 5
    assert "again" not in text
    supernet = json.loads((tmp_path / "out" / "atomnas-0.5x" / "result.json").read_text())["reference"]["macs"]
    for name, share in (("atomnas-0.5x", 0.5), ("atomnas-0.3x", 0.3), ("uniform-0.5x", 0.5)):
        result = json.loads((tmp_path / "out" / name / "result.json").read_text())
        assert result["outcomes"][0]["costs"]["macs"] <= share * supernet
