"""What cannot be used is refused with exit code 2 and one message that says what to do; nothing is written."""

import json
import math
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from helpers import EXPERTS, SHAPE, save_tiny, tiny_checkpoint, tiny_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import agzo_edge
from agzo_edge import errors
from agzo_edge.cli.run import exit_code_of
from agzo_edge.config import config_from
from agzo_edge.errors import AgzoError, ConfigError

QUICK = ("--device", "cpu", "--max-steps", "2", "--batch-size", "2", "--max-seq-length", "48")


class Bench:
    """A directory with a model, data and configurations to go wrong with."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root = root
        self.capsys = capsys
        self.model = tiny_checkpoint("llama")
        self.out = root / "out"
        self.data = self.file("good.jsonl", '{"text": "one line"}\n{"text": "another line"}\n')

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.root / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def copy_of_model(self, name: str = "model") -> Path:
        return Path(shutil.copytree(self.model, self.root / name))

    def train(self, *extra: object, model: object = None, data: object = None, out: object = None) -> list[str]:
        settings = ["--model", model or self.model, "--data", data or self.data, "--output-dir", out or self.out]
        return ["train", *map(str, settings), *QUICK, *map(str, extra)]

    def run(self, arguments: list[str]) -> tuple[int, str]:
        """Exit code and what stands on stderr."""
        code = exit_code_of(arguments)
        return code, self.capsys.readouterr().err

    def refused(self, arguments: list[str], *named: object, exit_code: int = 2) -> str:
        """Run what must be refused, saying every text of `named` in one message; nothing may be written."""
        before = snapshot(self.root)
        code, message = self.run(arguments)
        assert code == exit_code, message
        assert message.startswith("error: ")
        assert message.count("error: ") == 1
        assert "Traceback" not in message
        for text in named:
            assert str(text) in message
        assert snapshot(self.root) == before
        return message


def snapshot(root: Path) -> dict[str, bytes]:
    """Every file and directory below `root`, with what it holds."""
    return {str(path): b"" if path.is_dir() else path.read_bytes() for path in sorted(root.rglob("*"))}


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    return Bench(tmp_path, capsys)


def test_the_bench_itself_trains(bench: Bench) -> None:
    code, message = bench.run(bench.train())
    assert (code, message) == (0, "")
    assert (bench.out / "adapter_model.safetensors").is_file()


# models


def test_no_such_model(bench: Bench) -> None:
    bench.refused(bench.train(model=bench.root / "nowhere"), bench.root / "nowhere", "no such directory")


def test_a_directory_that_holds_no_model(bench: Bench) -> None:
    (bench.root / "empty").mkdir()
    bench.refused(bench.train(model=bench.root / "empty"), "no config.json", "is it the directory of a model?")


def test_a_file_in_place_of_the_models_directory(bench: Bench) -> None:
    bench.refused(bench.train(model=Path(bench.model) / "config.json"), "is a file: give the directory")


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Bert", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}),
        ("T5", {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_ff": 48, "d_kv": 16}),
    ],
)
def test_a_model_that_is_no_causal_language_model(bench: Bench, family: str, settings: dict[str, int]) -> None:
    config = getattr(transformers, f"{family}Config")(vocab_size=300, **settings)
    model_class = {"Bert": transformers.BertForMaskedLM, "T5": transformers.T5ForConditionalGeneration}[family]
    model_class(config).save_pretrained(bench.root / "model")
    tiny_tokenizer().save_pretrained(bench.root / "model")
    bench.refused(bench.train(model=bench.root / "model"), "not a causal language model", model_class.__name__)


def test_a_model_without_attention(bench: Bench) -> None:
    config = transformers.Mamba2Config(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_heads=4, head_dim=16)
    transformers.Mamba2ForCausalLM(config).save_pretrained(bench.root / "model")
    tiny_tokenizer().save_pretrained(bench.root / "model")
    bench.refused(bench.train(model=bench.root / "model"), "not a causal language model", "mamba2 has no attention")


def test_weights_that_hold_nan_are_told_of_as_such(bench: Bench) -> None:
    model = bench.copy_of_model()
    weights = load_file(model / "model.safetensors")
    next(tensor for name, tensor in weights.items() if name.endswith("down_proj.weight"))[0, 0] = math.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    bench.refused(bench.train(model=model), "gives no finite loss on any row: its weights hold NaN or infinite numbers")


def test_a_configuration_with_more_layers_than_there_are_tensors(bench: Bench) -> None:
    model = bench.copy_of_model()
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 10**9}))
    bench.refused(bench.train(model=model), "config.json gives 1,000,000,000 layers")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_checkpoint_that_could_run_code_when_it_is_read(bench: Bench, name: str) -> None:
    model = bench.copy_of_model()
    (model / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(2)}, model / name)
    bench.refused(bench.train(model=model), name, "only safetensors is read", "save_pretrained")


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "..\\outside.safetensors"])
def test_a_shard_index_that_points_outside_its_directory(bench: Bench, shard: str) -> None:
    model = bench.copy_of_model()
    with safe_open(model / "model.safetensors", "pt") as file:
        names = list(file.keys())
    shutil.move(model / "model.safetensors", bench.root / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    bench.refused(bench.train(model=model), "points outside its directory", repr(shard), "Do not use")


def test_a_checkpoint_cut_short(bench: Bench) -> None:
    model = bench.copy_of_model()
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    bench.refused(bench.train(model=model), "model.safetensors", "download it again")


def test_a_model_that_brings_code_is_refused_and_its_code_is_not_run(bench: Bench) -> None:
    model = bench.copy_of_model()
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "zorg", "architectures": ["ZorgForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "zorg.ZorgConfig", "AutoModelForCausalLM": "zorg.ZorgForCausalLM"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "zorg.py").write_text(f"open({str(bench.root / 'ran')!r}, 'w').close()\n")
    bench.refused(bench.train(model=model), "needs Python code of its own", "--trust-remote-code")
    assert not (bench.root / "ran").exists()


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_tokenizer_that_knows_more_words_than_the_model(bench: Bench, command: str) -> None:
    small = save_tiny(transformers.LlamaConfig(**{**SHAPE, "vocab_size": 60}), bench.root / "small")
    arguments = bench.train(model=small)
    if command == "eval":
        arguments = ["eval", "--model", str(small), "--data", str(bench.data), "--device", "cpu"]
    bench.refused(arguments, "good.jsonl:1: token ", " of 60 words: the tokenizer is not the model's")


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [("dtype", "float99", "float99"), ("pad_token_id", 10**6, "cannot be loaded"), ("hidden_act", "zorg", "zorg")],
)
def test_a_config_that_the_loader_cannot_follow(bench: Bench, field: str, value: object, named: str) -> None:
    model = bench.copy_of_model()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {field: value}))
    bench.refused(bench.train(model=model), named)


def test_the_same_fault_in_many_rows_is_told_once(bench: Bench) -> None:
    data = bench.file("many.jsonl", '{"question": "why?"}\n' * 1200)
    message = bench.refused(bench.train(data=data), "1,200 of 1,200 rows", "many.jsonl:1: fields 'question'")
    assert "(and 1,199 more rows)" in message
    assert len(message.splitlines()) < 6


def test_experts_are_refused_by_a_plan_as_by_a_run(bench: Bench) -> None:
    model = save_tiny(transformers.Qwen3MoeConfig(**SHAPE, **EXPERTS), bench.root / "experts")
    for command in (["plan", "--model", str(model)], bench.train(model=model)):
        bench.refused(command, "--target-modules", "q_proj")
    assert bench.run(["plan", "--model", str(model), "--target-modules", "q_proj,v_proj"])[0] == 0


def test_experts_fused_into_one_tensor_are_refused_by_name(bench: Bench) -> None:
    model = save_tiny(transformers.MixtralConfig(**SHAPE, **EXPERTS), bench.root / "model")
    bench.refused(bench.train(model=model), "experts", "--target-modules")


def test_a_layer_to_train_that_the_model_lacks(bench: Bench) -> None:
    bench.refused(bench.train("--target-modules", "q_proj,nope"), "nope", "q_proj")


# data


def _no_file(bench: Bench) -> Path:
    return bench.root / "nowhere.jsonl"


def _no_rows(bench: Bench) -> Path:
    return bench.file("empty.jsonl", "")


def _blank_lines(bench: Bench) -> Path:
    return bench.file("blank.jsonl", "\n \n")


def _broken_json(bench: Bench) -> Path:
    return bench.file("broken.jsonl", '{"text": "a"}\n\n{"text": "b"\n{"text": "c"}\n')


def _no_label(bench: Bench) -> Path:
    return bench.file("unlabelled.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": ""}\n')


def _mixed(bench: Bench) -> Path:
    return bench.file("mixed.jsonl", '{"text": "a b"}\n{"prompt": "a", "completion": "b"}\n')


def _other_fields(bench: Bench) -> Path:
    return bench.file("other.jsonl", '{"sentence": "a", "label": 1}\n')


def _a_number(bench: Bench) -> Path:
    return bench.file("number.jsonl", '{"text": 3}\n')


def _not_utf8(bench: Bench) -> Path:
    return bench.file("latin1.jsonl", b'{"text": "caf\xe9"}\n')


def _notes_not_utf8(bench: Bench) -> Path:
    return bench.file("notes.txt", b"fine\ncaf\xe9\n")


def _ragged_table(bench: Bench) -> Path:
    return bench.file("table.csv", "prompt,completion\na,b\nc\n")


def _no_parquet(bench: Bench) -> Path:
    return bench.file("table.parquet", "hello")


def _no_gzip(bench: Bench) -> Path:
    return bench.file("notes.jsonl.gz", "hello")


def _unknown_kind(bench: Bench) -> Path:
    return bench.file("notes.docx", "hello")


def _directory_without_splits(bench: Bench) -> Path:
    (bench.root / "folder").mkdir()
    (bench.root / "folder" / "notes.jsonl").write_text('{"text": "a"}\n')
    return bench.root / "folder"


def _messages(bench: Bench) -> Path:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    return bench.file("chat.jsonl", json.dumps({"messages": turns}) + "\n")


def _long_row(bench: Bench) -> Path:
    return bench.file("long.jsonl", json.dumps({"text": "x" * 80}) + "\n")


def _lone_surrogate(bench: Bench) -> Path:
    return bench.file("half.jsonl", '{"text": "ok"}\n{"text": "\\ud83d"}\n')


def _nul_byte(bench: Bench) -> Path:
    return bench.file("nul.jsonl", '{"text": "a\\u0000b"}\n')


def _utf16(bench: Bench) -> Path:
    return bench.file("utf16.jsonl", '{"text": "a"}\n'.encode("utf-16"))


def _missing_column(bench: Bench) -> Path:
    return bench.file("columns.csv", "prompt,answer\na,b\nc,d\n")


def _half_a_parquet_file(bench: Bench) -> Path:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a line"] * 1000}), bench.root / "whole.parquet")
    whole = (bench.root / "whole.parquet").read_bytes()
    (bench.root / "whole.parquet").unlink()
    return bench.file("half.parquet", whole[: len(whole) // 2])


def _null(bench: Bench) -> Path:
    return bench.file("null.jsonl", '{"text": null}\n')


def _one_long_line(bench: Bench) -> Path:
    return bench.file("line.jsonl", b'{"text": "' + b"x" * 50 * 2**20 + b'"}\n')


@pytest.mark.parametrize(
    ("spoilt", "named"),
    [
        (_lone_surrogate, ("half.jsonl:2", "half a surrogate pair")),
        (_nul_byte, ("nul.jsonl:1", "NUL character")),
        (_utf16, ("utf16.jsonl:1", "broken JSON")),
        (_missing_column, ("columns.csv:2", "'prompt', 'answer'", "completion")),
        (_half_a_parquet_file, ("half.parquet", "cannot be read as Parquet")),
        (_null, ("null.jsonl:1", "text is null")),
        (_one_long_line, ("line.jsonl:1", "longer than 16.0 MiB")),
        (_no_file, ("nowhere.jsonl", "no such file")),
        (_no_rows, ("empty.jsonl", "holds no rows")),
        (_blank_lines, ("blank.jsonl", "holds no rows")),
        (_broken_json, ("broken.jsonl:3", "broken JSON")),
        (_no_label, ("unlabelled.jsonl:2", "completion is empty")),
        (_mixed, ("mixed.jsonl:2", "keep one format in a file")),
        (_other_fields, ("other.jsonl:1", "sentence", "prompt and completion")),
        (_a_number, ("number.jsonl:1", "must be a string")),
        (_not_utf8, ("latin1.jsonl:1", "save the file as UTF-8")),
        (_notes_not_utf8, ("notes.txt:2", "save the file as UTF-8")),
        (_ragged_table, ("table.csv:3", "2 columns")),
        (_no_parquet, ("table.parquet", "cannot be read as Parquet")),
        (_no_gzip, ("notes.jsonl.gz", "cannot be read")),
        (_unknown_kind, ("notes.docx", ".jsonl", ".parquet")),
        (_directory_without_splits, (".* in it (notes.jsonl)", "rename")),
        (_messages, ("chat.jsonl", "chat template", "prompt and completion")),
        (_long_row, ("long.jsonl:1", "--max-seq-length", "--overlong truncate or drop")),
    ],
)
@pytest.mark.parametrize("flag", ["--data", "--eval-data"])
def test_data_that_cannot_be_used(
    bench: Bench, flag: str, spoilt: Callable[[Bench], Path], named: tuple[str, ...]
) -> None:
    path = spoilt(bench)
    bench.refused(bench.train(data=path) if flag == "--data" else bench.train(flag, path), *named)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (("--options", "yes"), ("options", "at least 2 are needed")),
        (("--labels", "0,0"), ("labels ['0', '0'] holds one twice",)),
        (("--options", "yes,yes"), ("options", "holds one twice")),
        (("--options", "yes,no", "--labels", "1,2,3"), ("3 labels for 2 options",)),
        (("--prompt-template", "{text"), ("prompt_template", "expected '}'")),
        (("--prompt-template", "{text.x}"), ("prompt_template", "{text.x} is no field's name")),
        (("--line-pattern", "("), ("line_pattern", "no regular expression")),
        (("--options", "yes,no", "--prompt-template", "{line}"), ("good.jsonl:1", "'line' is missing")),
        (("--options", "é,ü", "--prompt-template", "{text}", "--labels", "one line,another line",
          "--answer-field", "text"), ("good.jsonl:1", "options 0 and 1 are the same tokens")),
    ],
)  # fmt: skip
def test_settings_that_make_no_rows(bench: Bench, extra: tuple[str, ...], named: tuple[str, ...]) -> None:
    bench.refused(bench.train("--objective", "choice", *extra), *named)


def test_a_choice_without_options(bench: Bench) -> None:
    bench.refused(bench.train("--objective", "choice"), "good.jsonl:1", "options", "--objective lm")


def test_nothing_is_left_after_dropping(bench: Bench) -> None:
    bench.refused(bench.train("--overlong", "drop", "--max-seq-length", "3"), "no row is left", "--max-seq-length")


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_row_longer_than_the_models_positions(bench: Bench, command: str) -> None:
    data = bench.file("long.jsonl", json.dumps({"text": "x" * 200}) + "\n")
    model = tiny_checkpoint("gpt2")  # its positions are a table of 128: one more is an IndexError in torch
    arguments = bench.train("--max-seq-length", 300, model=model, data=data)
    if command == "eval":
        arguments = ["eval", "--model", model, "--data", str(data), "--max-seq-length", "300"]
    told = "the longest has 201 tokens, and the model positions for 128: --overlong truncate or drop"
    bench.refused(arguments, "long.jsonl:1: more than 128 tokens", told)


# flags, files of settings, profiles


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (("--modle", "x"), ("--modle", "train --help")),
        (("--rank", "0"), ("rank", "0", "greater than or equal to 1")),
        (("--rank", "four"), ("--rank", "valid integer")),
        (("--optimizer", "sgdd"), ("--optimizer", "sgdd", "momentum")),
        (("--preset", "papre"), ("papre", "paper")),
        (("--learning-rate", "inf"), ("learning_rate", "finite")),
        (("--learning-rate", "nan"), ("learning_rate", "nan")),
        (("--mu", "0"), ("mu", "positive")),
        (("--mu", "inf"), ("mu", "finite")),
        (("--clip", "inf"), ("clip", "finite")),
        (("--ram-limit", "6"), ("ram_limit", "6GiB")),
        (("--ram-limit", "6GX"), ("ram_limit", "GX", "GiB")),
        (("--ram-limit", "-6GiB"), ("ram_limit", "-6GiB")),
        (("--warmup-steps", "9"), ("warmup_steps is 9", "only 2 steps")),
        (("--micro-batch-size", "9"), ("micro_batch_size 9", "batch_size 2")),
        (("--load-in-4bit", "--load-in-8bit"), ("load_in_4bit", "load_in_8bit", "choose one")),
        (("--profile", "rtx-3060"), ("rtx-3060", "did you mean rtx-3060-12gb")),
        (("--profile", ""), ("profile ''", "rtx-3060-12gb")),
        (("--adapter", ""), ("adapter", "''")),
        (("--eval-data", ""), ("eval_data", "''")),
        (("--target-modules", ""), ("target_modules", "at least 1")),
        (("stray",), ("stray", "train --help")),
    ],
)
def test_a_setting_that_cannot_be_used(bench: Bench, extra: tuple[str, ...], named: tuple[str, ...]) -> None:
    bench.refused(bench.train(*extra), *named)


@pytest.mark.parametrize("flag", ["--model", "--data", "--output-dir"])
def test_an_empty_value_is_no_default(bench: Bench, flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (bench.root / "elsewhere").mkdir()
    monkeypatch.chdir(bench.root / "elsewhere")  # "" must not become this directory
    arguments = bench.train()
    arguments[arguments.index(flag) + 1] = ""
    bench.refused(arguments, flag[2:].replace("-", "_"), "''")


def test_what_is_missing_is_named(bench: Bench) -> None:
    bench.refused(["train", "--model", bench.model, "--data", str(bench.data)], "needs --output-dir")
    bench.refused(["train", "--data", str(bench.data)], "--model", "the demo")
    bench.refused(["eval", "--model", bench.model], "--data")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("[method]\nrnak = 3\n", ("rnak", "no such setting")),
        ('rank = "x"\neval_steps = -1\n', ("rank", "eval_steps")),
        ("rank = \n", ("run.toml", "cannot be read as TOML", "line 1")),
        ("rank = 3\n[method]\nrank = 4\n", ("run.toml", "set twice: rank")),
        ('preset = ["fast"]\n', ("preset ['fast'] does not exist",)),
        ("target_modules = 5\n", ("target_modules: 5 given",)),
    ],
)
def test_a_file_of_settings_that_cannot_be_used(bench: Bench, content: str, named: tuple[str, ...]) -> None:
    bench.refused(bench.train("--config", bench.file("run.toml", content)), *named)


@pytest.mark.parametrize("name", ["model", "adapter", "data", "eval_data", "output_dir"])
def test_a_home_is_found_wherever_a_path_is_given(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert getattr(config_from({name: "~/notes"}), name) == str(tmp_path / "notes")
    with pytest.raises(ConfigError, match="nobody has this home"):
        config_from({name: "~nosuchuser/notes"})


@pytest.mark.parametrize("flag", ["--model", "--adapter", "--profile"])
def test_the_home_of_nobody(bench: Bench, flag: str) -> None:
    bench.refused(["generate", "--prompt", "one", flag, "~nosuchuser/x"], "~nosuchuser/x", "home")


def test_a_file_of_settings_that_is_not_there(bench: Bench) -> None:
    bench.refused(bench.train("--config", bench.root / "run.toml"), "run.toml", "no such configuration file")


def test_a_profile_with_an_unknown_field(bench: Bench) -> None:
    profile = bench.file("machine.toml", 'name = "mine"\nkind = "cpu"\nmemroy = "4GiB"\n')
    bench.refused(bench.train("--profile", profile), "memroy", "did you mean memory")


def test_a_later_source_says_the_width() -> None:
    assert not config_from({"load_in_8bit": True}, {"load_in_4bit": True}).load_in_8bit
    assert not config_from({"load_in_4bit": True}, {"load_in_8bit": True}).load_in_4bit


@pytest.mark.parametrize(
    ("flag", "value"), [("--top-p", "0"), ("--temperature", "-1"), ("--temperature", "inf"), ("--seed", str(2**70))]
)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_sampling_that_cannot_be_used(bench: Bench, command: str, flag: str, value: str) -> None:
    prompt = ["--prompt", "x"] if command == "generate" else []
    bench.refused([command, "--model", bench.model, *prompt, flag, value], flag[2:].replace("-", "_").split("_")[0])


def test_a_conversation_with_a_model_that_has_no_template(bench: Bench) -> None:
    bench.refused(["chat", "--model", bench.model], "no chat template", "generate --prompt")


def test_a_prompt_from_bytes_that_are_no_utf8(bench: Bench) -> None:
    bench.refused(["generate", "--model", bench.model, "--prompt", "caf\udce9"], "the prompt is no text")


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_an_empty_name_of_an_adapter_is_not_no_adapter(bench: Bench, command: str) -> None:
    more = ["--prompt", "x"] if command == "generate" else ["--data", str(bench.data)]
    bench.refused([command, "--model", bench.model, "--adapter", "", *more], "adapter")


# output directories, runs, adapters


def test_an_output_directory_that_holds_another_run(bench: Bench) -> None:
    assert bench.run(bench.train())[0] == 0
    bench.refused(bench.train(), bench.out, "holds another run", "--resume-from-checkpoint", "--output-dir")
    bench.refused(bench.train("--seed", 5, "--resume-from-checkpoint"), "seed was 0 and is 5")


def test_an_output_directory_with_other_files(bench: Bench) -> None:
    bench.out.mkdir()
    (bench.out / "thesis.tex").write_text("years of work")
    bench.refused(bench.train(), bench.out, "not empty", "choose another --output-dir")


@pytest.mark.parametrize("below", [".", "deeper/still"])
def test_an_output_directory_that_is_a_file_or_below_one(bench: Bench, below: str) -> None:
    file = bench.file("file", "hello")
    bench.refused(bench.train(out=file / below), file, "is a file", "choose another --output-dir")


def test_an_output_directory_that_cannot_be_written_to(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.out.mkdir()
    bench.out.chmod(stat.S_IRUSR | stat.S_IXUSR)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    bench.refused(bench.train(out=bench.out / "run"), bench.out, "cannot be written to", "--output-dir")


def test_a_run_that_another_process_began_meanwhile_is_left_alone(bench: Bench) -> None:
    from agzo_edge.config import config_from
    from agzo_edge.errors import AdapterError
    from agzo_edge.events import ModelReady
    from agzo_edge.session import training

    settings = {"model": bench.model, "data": bench.data, "output_dir": bench.out, "device": "cpu", "mu": 0.01}
    config = config_from(settings, {"max_steps": 2, "batch_size": 2, "max_seq_length": 48})
    slow = training(config)
    assert any(isinstance(event, ModelReady) for event in slow), "it has looked at the directory, and found it unused"
    assert bench.run(bench.train())[0] == 0
    before = snapshot(bench.out)
    with pytest.raises(AdapterError, match="holds another run"):
        list(slow)
    assert snapshot(bench.out) == before


@pytest.mark.parametrize(
    "arguments", [["replay", "{}"], ["report", "{}"], ["export", "--adapter", "{}", "--to", "peft", "--output", "{}/x"]]
)
def test_a_directory_that_holds_no_run(bench: Bench, arguments: list[str]) -> None:
    bench.refused([argument.format(bench.root) for argument in arguments], bench.root, "no ")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"finished": true, "evaluations": [1], "samples": []}'])
def test_a_report_that_is_damaged_or_not_a_runs(bench: Bench, content: str) -> None:
    bench.file("report.json", content)
    bench.refused(["report", str(bench.root)], "report.json")


@pytest.mark.parametrize("command", ["train", "eval", "generate"])
def test_an_adapter_of_another_model(bench: Bench, command: str) -> None:
    assert bench.run(bench.train())[0] == 0
    other = tiny_checkpoint("gpt2")
    arguments = {
        "train": bench.train("--adapter", bench.out, model=other, out=bench.root / "second"),
        "eval": ["eval", "--model", other, "--adapter", str(bench.out), "--data", str(bench.data)],
        "generate": ["generate", "--model", other, "--adapter", str(bench.out), "--prompt", "x"],
    }[command]
    bench.refused(arguments, "does not fit the model", "model.layers.0")


# the budget, and other ways in


def test_a_budget_that_cannot_hold_the_run_is_told_in_numbers(bench: Bench) -> None:
    said = ("allows 1.0 MiB", "MiB of device memory", "raise the limit, or take a smaller model")
    bench.refused(bench.train("--ram-limit", "1MiB"), *said, exit_code=3)


def test_with_json_the_failure_is_an_object_on_stdout(bench: Bench) -> None:
    code = exit_code_of(bench.train("--json", data=bench.root / "nowhere.jsonl"))
    last = json.loads(bench.capsys.readouterr().out.splitlines()[-1])
    assert code == last["error"]["exit_code"] == 2
    assert last["error"]["kind"] == "DataError"
    assert "nowhere.jsonl" in last["error"]["message"]
    assert not bench.out.exists()


def test_every_error_can_be_caught_by_its_public_name() -> None:
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, AgzoError)}
    assert kinds <= set(agzo_edge.__all__)


def test_the_python_api_refuses_the_same_way(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="no such setting"):
        agzo_edge.finetune(bench.model, str(bench.data), outputdir="x")
    with pytest.raises(AgzoError, match="no such file") as caught:
        agzo_edge.finetune(bench.model, str(bench.root / "nowhere.jsonl"), output_dir=str(bench.out), device="cpu")
    assert caught.value.exit_code == 2
    assert not bench.out.exists()


def test_the_python_api_takes_paths(bench: Bench) -> None:
    run = agzo_edge.finetune(
        Path(bench.model), bench.data, output_dir=bench.out, device="cpu", max_steps=1, batch_size=2, mu=0.01
    )
    assert run.adapter == bench.out
