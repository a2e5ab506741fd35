import pytest

from archsmith.core.errors import UserError
from archsmith.cost.energy import Energy, NotAvailable, energy_counters, measure_energy


def package(root, number=0, *, energy=0, largest=1_000_000_000, name="package-0"):
    folder = root / f"intel-rapl:{number}"
    folder.mkdir()
    for file, text in (("name", name), ("energy_uj", energy), ("max_energy_range_uj", largest)):
        (folder / file).write_text(f"{text}\n")
    return folder / "energy_uj"


class Machine:
    """A machine that takes 10 W idle and 30 W while it runs a network that lasts 0.01 s."""

    def __init__(self, file, largest=1_000_000_000):
        self.file, self.largest, self.now = file, largest, 0.0

    def spend(self, seconds, watts):
        self.now += seconds
        self.file.write_text(str(int(int(self.file.read_text()) + seconds * watts * 1e6) % self.largest))

    def run(self, calls):
        self.spend(0.01 * calls, 30)

    def measure(self, root):
        found = measure_energy(
            self.run, seconds=1.0, root=root, clock=lambda: self.now, sleep=lambda seconds: self.spend(seconds, 10)
        )
        assert isinstance(found, Energy)
        return found


def test_joules_of_a_call_are_those_of_the_package_with_the_idle_ones_beside(tmp_path):
    energy = Machine(package(tmp_path)).measure(tmp_path)
    assert energy.joules_per_call == pytest.approx(0.3, rel=1e-3)
    assert energy.idle_joules_per_call == pytest.approx(0.1, rel=1e-3)
    assert energy.net_joules_per_call == pytest.approx(0.2, rel=1e-3)
    assert energy.domains == ("package-0",) and energy.seconds >= 1


def test_a_counter_that_begins_anew_does_no_harm(tmp_path):
    energy = Machine(package(tmp_path, energy=5_000_000, largest=45_000_000), 45_000_000).measure(tmp_path)
    assert energy.joules_per_call == pytest.approx(0.3, rel=1e-2)


def test_parts_of_a_package_are_not_added_to_it(tmp_path):
    package(tmp_path)
    part = tmp_path / "intel-rapl:0:0"
    part.mkdir()
    package(tmp_path, 1, name="package-1")
    found = energy_counters(tmp_path)
    assert [each.name for each in found] == ["package-0", "package-1"]


def test_without_counters_there_is_a_reason_and_no_number(tmp_path):
    for root in (tmp_path, tmp_path / "nowhere"):
        found = measure_energy(lambda calls: None, root=root)
        assert isinstance(found, NotAvailable) and not found
        assert str(found).startswith("not available (no RAPL counters under")


def test_counters_that_cannot_be_read_are_not_available(tmp_path):
    package(tmp_path).unlink()
    found = energy_counters(tmp_path)
    assert isinstance(found, NotAvailable)
    assert "intel-rapl:0 cannot be read" in found.reason


def test_a_duration_has_to_be_positive(tmp_path):
    with pytest.raises(UserError, match="seconds"):
        measure_energy(lambda calls: None, seconds=0, root=tmp_path)
