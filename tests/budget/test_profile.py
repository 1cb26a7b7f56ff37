import re
from pathlib import Path

import pytest

from agzo_edge.budget.profile import load_profile, profile_folder, profile_names
from agzo_edge.config import config_from, read_toml
from agzo_edge.errors import ConfigError
from agzo_edge.units import GIB

GOOD = """
name = "mine"
kind = "cuda"
memory = "8GiB"
reserve = "1GiB"
context_overhead = "400MiB"
compute_capability = "8.6"
"""


def test_twenty_machines_are_shipped_from_4_to_24_gb_small_hosts_and_boards() -> None:
    profiles = [load_profile(name) for name in profile_names()]
    cards = sorted(profile.memory for profile in profiles if profile.kind == "cuda" and not profile.unified_memory)
    hosts = sorted(profile.memory for profile in profiles if profile.kind == "cpu")
    assert len(profiles) >= 20
    assert cards[0] == 4 * GIB
    data_center = cards.pop()
    assert data_center == load_profile("h200-141gb").memory
    assert cards[-1] == 24 * GIB
    assert hosts == [8 * GIB, 16 * GIB]
    assert sum(profile.unified_memory for profile in profiles) >= 3


def test_a_card_is_named_by_one_profile_of_each_size() -> None:
    known = [
        (device, profile.memory) for profile in map(load_profile, profile_names()) for device in profile.device_names
    ]
    assert len(known) == len(set(known))


@pytest.mark.parametrize("name", profile_names())
def test_a_shipped_profile_is_named_like_its_file_and_suggests_settings_that_exist(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert 0 < profile.context_overhead < profile.budget_bytes < profile.memory
    assert config_from(profile.settings).batch_size == profile.settings["batch_size"]


@pytest.mark.parametrize("name", profile_names())
def test_every_number_of_a_profile_says_where_it_comes_from(name: str) -> None:
    lines = (profile_folder() / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    settings = [line.split("=", 1)[1] for line in lines if "=" in line and not line.startswith("#")]
    numbers = [text for text in settings if re.match(r'\s*"?[0-9.]+', text)]
    assert len(numbers) >= 6
    for text in numbers:
        assert re.search(r"#\s*\w.{10,}", text), f"no origin: {text}"


@pytest.mark.parametrize("name", profile_names())
def test_a_profile_says_how_to_use_and_override_it(name: str) -> None:
    header = (profile_folder() / f"{name}.toml").read_text(encoding="utf-8").split("\n\n")[0]
    assert f"--profile {name}" in header
    assert "Override" in header


def test_an_unknown_name_is_answered_with_the_close_ones_and_all() -> None:
    with pytest.raises(ConfigError, match=r"did you mean rtx-3060-12gb.*cpu.*t4-16gb"):
        load_profile("rtx-3060")


def test_a_file_can_be_given_by_its_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(GOOD)
    assert load_profile(str(file)).budget_bytes == 7 * GIB


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("memory_bandwith_gb_s = 1.0", "did you mean memory_bandwidth_gb_s"),
        ("memory_bandwidth_gb_s = -1.0", "greater than 0"),
        ('host_memory = "-1GiB"', "not an amount"),
        ("host_memory = -5", "greater than 0"),
        ('host_memory = "16"', "has no unit"),
        ('unified_memory = true\nhost_memory = "8GiB"', "leave host_memory out"),
        ("[settings]\nbatchsize = 4", "did you mean batch_size"),
        ("[settings]\nbatch_size = 0", "batch_size"),
        (f'host_memory = "{"9" * 400}GiB"', "more memory than any machine has"),
        (f"host_memory = {10**400}", "less than"),
        (f"[settings]\nrank = {'[' * 100_000}", "TOML"),
        ("not toml", "TOML"),
    ],
)
def test_a_wrong_line_is_refused_by_name(tmp_path: Path, line: str, fault: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(GOOD + line)
    with pytest.raises(ConfigError, match=fault):
        load_profile(str(file))


def test_all_faults_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('name = "x"\nkind = "tpu"\nmemory = "8"\n')
    with pytest.raises(ConfigError, match=r"(?s)kind.*memory.*reserve.*context_overhead"):
        load_profile(str(file))


def test_a_reserve_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(GOOD.replace('"1GiB"', '"8GiB"'))
    with pytest.raises(ConfigError, match="leave nothing"):
        load_profile(str(file))


@pytest.mark.parametrize("path", ["a" * 300 + ".toml", "a\0b.toml"])
def test_a_path_that_can_be_none_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        load_profile(path)


def test_a_configuration_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "deep.toml"
    file.write_text(f"rank = {'[' * 100_000}")
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        read_toml(file)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere/x\.toml: no such file"):
        load_profile("nowhere/x.toml")
