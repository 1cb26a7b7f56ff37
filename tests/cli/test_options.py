import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import typer

from agzo_edge.api import resolve
from agzo_edge.cli.commands import app
from agzo_edge.cli.options import as_flags, given
from agzo_edge.cli.run import exit_code_of
from agzo_edge.cli.training import plan, train
from agzo_edge.config import RunConfig
from agzo_edge.demo import MODEL_DIR
from agzo_edge.errors import UsageError

OWN = {"context", "config_file", "preset", "resume", "dry_run", "as_json", "sweep", "sweep_image"}


def options_of(command: str) -> dict[str, Any]:
    """The parsed parameters of a command, by name."""
    group: Any = typer.main.get_command(app)
    return {parameter.name: parameter for parameter in group.commands[command].params}


@pytest.mark.parametrize("command", [train, plan])
def test_flags_are_exactly_the_fields_of_a_run(command: Any) -> None:
    flags = inspect.signature(command).parameters.keys() - OWN
    assert flags == RunConfig.model_fields.keys()


def test_every_flag_is_not_given_by_default() -> None:
    assert {options_of("train")[name].default for name in RunConfig.model_fields} == {None}


@pytest.mark.parametrize("flag", ["--logits-chunk", "--ram-limit", "--vram-limit"])
def test_a_size_is_given_with_its_unit(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = [flag, "4GiB", "--model", str(MODEL_DIR), "--profile", "cpu", "--max-seq-length", "64", "--json"]
    assert exit_code_of(["plan", *run]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]


def test_every_flag_stands_under_one_of_five_headings() -> None:
    headings = {options_of("train")[name].rich_help_panel for name in RunConfig.model_fields}
    assert headings == {"Model", "Data", "Method", "Memory", "Output"}


def test_help_of_a_flag_says_what_its_field_says() -> None:
    options = options_of("train")
    for name, field in RunConfig.model_fields.items():
        assert field.description is not None
        assert options[name].help.startswith(field.description)
    assert "default: 16; from 1 to 64" in options["rank"].help
    assert "sign, gaussian; default: sign" in options["noise"].help


def test_yes_and_no_fields_have_a_flag_for_each_answer() -> None:
    for name, field in RunConfig.model_fields.items():
        spelled = name.replace("_", "-")
        option = options_of("train")[name]
        assert option.opts == [f"--{spelled}"]
        assert option.secondary_opts == ([f"--no-{spelled}"] if field.annotation is bool else [])


def test_only_given_settings_are_passed_on_and_lists_are_taken_apart() -> None:
    settings = {"rank": None, "relative": False, "target_modules": "q_proj, v_proj,", "mu": "0.1"}
    assert given(settings) == {"relative": False, "target_modules": ("q_proj", "v_proj"), "mu": "0.1"}


def test_options_and_labels_keep_their_spaces_and_a_json_list_its_commas() -> None:
    given_settings = given({"options": " terrible, great", "labels": '["0", " 1, or 2"]'})
    assert given_settings == {"options": (" terrible", " great"), "labels": ("0", " 1, or 2")}
    assert "as a JSON list" in options_of("train")["options"].help
    with pytest.raises(UsageError, match=r"--labels .* JSON list"):
        given({"labels": "[0, 1"})


def test_flags_written_out_give_the_same_settings_again() -> None:
    settings = {
        "rank": 8,
        "relative": False,
        "load_in_8bit": True,
        "target_modules": ("q", "v"),
        "options": (" a", " b"),
        "labels": ("0, or 1", "2"),
        "model": None,
    }
    words = as_flags(settings)
    assert words[:6] == ["--rank", "8", "--no-relative", "--load-in-8bit", "--target-modules", "q,v"]
    parsed = typer.main.get_command(app).commands["plan"].make_context("plan", words).params  # type: ignore[attr-defined]
    assert given({name: value for name, value in parsed.items() if name in settings}) == {
        name: value for name, value in settings.items() if value is not None
    }


def test_commands_that_do_not_train_take_no_method(tmp_path: Path) -> None:
    assert "rank" not in options_of("generate")
    assert "eval_data" not in options_of("eval")


def test_a_preset_that_is_asked_for_wins_over_that_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('preset = "careful"\nrank = 3\n')
    asked, filed = resolve({}, config_file=file, preset="fast"), resolve({}, config_file=file)
    assert asked.rank == filed.rank == 3
    assert asked.learning_rate > filed.learning_rate
