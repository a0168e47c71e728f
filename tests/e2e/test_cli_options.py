"""Options that `handloom generate`, `chat` and others share: each means what it means in Python, or is an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from handloom.cli import app
from handloom.cli.arguments import Generation
from parity_checks import Pair, load_pair
from tiny_chat import save_chat
from tiny_models import save, tiny_gpt2

PROMPT = "Once upon a time, once upon a time"
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
LARK = 'start: "x" NUMBER\nNUMBER: /[0-9]{2}/\n'


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return load_pair(save_chat(tmp_path_factory.mktemp("chat"), context=512))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "schema.json").write_text(json.dumps(SCHEMA))
    (folder / "numbers.lark").write_text(LARK)
    (folder / "config.json").write_text('{"max_new_tokens": 5, "num_return_sequences": 2, "num_beams": 2}')
    (folder / "nulls.json").write_text('{"max_new_tokens": null, "num_return_sequences": null, "eos_token_id": null}')
    (folder / "no.json").write_text("{'a': 1}")
    (folder / "list.json").write_text("[]")
    (folder / "latin1.lark").write_bytes(b"start: \xe9")
    return folder


@pytest.fixture
def handloom(pair: Pair, files: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command in this process, on the tiny model, in the folder of `files`."""
    monkeypatch.chdir(files)

    def run(command: str, *arguments: Any, input: str | None = None) -> Result:
        words = [command, "--model", str(pair.folder), *map(str, arguments)]
        return CliRunner().invoke(app, words, input=input)

    return run


def found(result: Result) -> list[dict[str, Any]]:
    """The outputs of `generate --json`."""
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


SAME: list[tuple[list[str], dict[str, Any]]] = [
    (["--json-schema", json.dumps(SCHEMA)], {"json_schema": SCHEMA}),
    (["--json-schema", "schema.json"], {"json_schema": SCHEMA}),
    (["--regex", "[a-c]{3}=[0-9]+"], {"regex": "[a-c]{3}=[0-9]+"}),
    (["--grammar", "numbers.lark"], {"grammar": LARK}),
    (["--choices", "yes, of course", "--choices", "no"], {"choices": ["yes, of course", "no"]}),
    (["--guidance-scale", "3", "--negative-prompt", "Never"], {"guidance_scale": 3, "negative_prompt": "Never"}),
    (["--penalty-alpha", "0.9", "--top-k", "6"], {"penalty_alpha": 0.9, "top_k": 6}),
    (["--dola-layers", "[0]"], {"dola_layers": [0]}),
    (["--num-beams", "3", "--length-penalty", "-1"], {"num_beams": 3, "length_penalty": -1.0}),
    (["--set", "no_repeat_ngram_size=1"], {"no_repeat_ngram_size": 1}),
    (["--set", "no-repeat-ngram-size=1"], {"no_repeat_ngram_size": 1}),
    (["--set", "do_sample=True", "--seed", "2"], {"do_sample": True, "seed": 2}),
    (["--set", "sequence_bias=[[[7], 9.5]]"], {"sequence_bias": [[[7], 9.5]]}),
    (["--set", "typical_p=0.3", "--seed", "2"], {"typical_p": 0.3, "seed": 2}),
    (["--set", "regex=a=b=c"], {"regex": "a=b=c"}),
    (["--set", "stop_strings=null", "--set", "max_length=30"], {"max_length": 30}),
]


@pytest.mark.parametrize(("arguments", "options"), SAME, ids=[" ".join(arguments)[:40] for arguments, _ in SAME])
def test_an_option_means_what_it_means_in_python(
    pair: Pair, handloom: Callable[..., Result], arguments: list[str], options: dict[str, Any]
) -> None:
    limit = {} if "max_length" in options else {"max_new_tokens": 16}
    words = [word for name, value in limit.items() for word in (f"--{name.replace('_', '-')}", value)]
    (output,) = found(handloom("generate", PROMPT, "--json", *words, *arguments))
    lm = pair.lm()
    expected = lm.generate(PROMPT, **limit, **options)
    assert (output["token_ids"], output["text"]) == (expected.token_ids, expected.text)
    assert output["score"] == (None if expected.beams is None else expected.beams.score)
    assert output["token_ids"] != lm.generate(PROMPT, max_new_tokens=16).token_ids


@pytest.mark.parametrize(
    "arguments",
    [
        ["--prompt-lookup-num-tokens", "4"],
        ["--speculation", "suffix", "--num-assistant-tokens", "4"],
        ["--draft-model", "DRAFT", "--draft-quantize", "int8", "--num-assistant-tokens", "4"],
    ],
    ids=["prompt lookup", "suffix automaton", "draft model"],
)
def test_speculation_changes_no_token_and_says_what_it_did(
    pair: Pair, handloom: Callable[..., Result], arguments: list[str]
) -> None:
    arguments = [str(pair.folder) if word == "DRAFT" else word for word in arguments]
    (output,) = found(handloom("generate", PROMPT, "-n", 60, "--json", *arguments))
    assert output["token_ids"] == pair.lm().generate(PROMPT, max_new_tokens=60).token_ids
    assert output["drafts"]["drafted"] >= output["drafts"]["accepted"]
    said = handloom("generate", PROMPT, "-n", 60, *arguments).stderr
    assert "drafted tokens were right" in said
    if "--draft-model" in arguments:
        assert said.count(f"model: the folder {pair.folder}") == 2 and "int8" in said


def test_log_probabilities_of_the_prompt_are_in_the_json(pair: Pair, handloom: Callable[..., Result]) -> None:
    (output,) = found(handloom("generate", PROMPT, "-n", 1, "--json", "--set", "prompt_logprobs=2"))
    expected = pair.lm().generate(PROMPT, max_new_tokens=1, prompt_logprobs=2)
    assert output["prompt_logprobs"] == expected.prompt_logprobs
    assert output["prompt_top_logprobs"] == [[list(one) for one in top] for top in expected.prompt_top_logprobs]


def test_several_outputs_stand_one_below_the_other(pair: Pair, handloom: Callable[..., Result]) -> None:
    arguments = (PROMPT, "-n", 9, "--temperature", 1.5, "--seed", 3, "--num-return-sequences", 3)
    expected = pair.lm().generate(PROMPT, max_new_tokens=9, temperature=1.5, seed=3, num_return_sequences=3)
    outputs = found(handloom("generate", *arguments, "--json"))
    assert [output["token_ids"] for output in outputs] == [output.token_ids for output in expected]
    result = handloom("generate", *arguments)
    assert result.stdout == "".join(one.text if one.text.endswith("\n") else one.text + "\n" for one in expected)
    assert result.stderr.count("ended by length") == 3


def test_a_generation_config_counts_and_options_win_over_it(pair: Pair, handloom: Callable[..., Result]) -> None:
    outputs = found(handloom("generate", PROMPT, "--json", "--generation-config", "config.json"))
    assert [len(output["token_ids"]) for output in outputs] == [5, 5]
    (output,) = found(
        handloom("generate", PROMPT, "--json", "--generation-config", "config.json", "--num-return-sequences", 1)
    )
    assert output["score"] == pair.lm().generate(PROMPT, num_beams=2, max_new_tokens=5).beams.score


def test_nulls_of_a_generation_config_say_nothing(handloom: Callable[..., Result]) -> None:
    (output,) = found(
        handloom("generate", PROMPT, "--json", "--generation-config", "nulls.json", "--set", "eos_token_id=[]")
    )
    assert len(output["token_ids"]) == 256


def test_values_are_json_or_pythons_constants_or_text() -> None:
    settings = ["a=1", "b=True", "c=None", "d=null", 'e="1"', "f=[1,", "g=x=y", "--h-i=1e-3", "j=" + "[" * 10**5, "k="]
    assert Generation(settings=settings).options(logprobs=None, n=0) == {
        "n": 0, "a": 1, "b": True, "c": None, "d": None, "e": "1", "f": "[1,", "g": "x=y", "h_i": 0.001,
        "j": "[" * 10**5, "k": "",
    }  # fmt: skip
    assert Generation(temperature=0.0, top_k=0).options() == {"temperature": 0.0, "top_k": 0}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--set", "no_repeat_ngram_size"], "NAME=VALUE"),
        (["--set", "=3"], "NAME=VALUE"),
        (["--set", "no_repeat_ngram_siz=3"], "did you mean no_repeat_ngram_size"),
        (["--set", "typical_p=much"], "typical_p='much'"),
        (["--set", "top_k=3", "--set", "top-k=4"], "given twice"),
        (["--set", "top_k=3", "--top-k", "4"], "twice"),
        (["--set", "max_new_tokens=3", "-n", "4"], "twice"),
        (["--set", "use_cache=false"], "use_cache"),
        *((["--set", f"{name}=x", *json], f"'{name}' (from the caller) is no generation option")
          for name in ("self", "prompts", "params", "progress", "priority") for json in ([], ["--json"])),
        (["--set", "input_ids=[1]"], "input_ids"),
        (["--set", "output_scores=true", "--json"], "use it from Python"),
        (["--set", "prompt_logprobs=1"], "with --json only"),
        (["--set", "assistant_model=some/model"], "assistant_model"),
        (["--set", "logits_processor=some.module"], "logits_processor"),
        (["--set", "streamer=x"], "streamer"),
        (["--stop", "a", "--set", "stop_strings=b"], "two names of one option"),
        (["--json-schema", "nowhere.json"], "there is no such file"),
        (["--json-schema", "no.json"], "JSON text"),
        (["--json-schema", "{"], "JSON text"),
        (["--json-schema", ""], "there is no such file"),
        (["--regex", "a("], "regex"),
        (["--grammar", "start: x"], "there is no such file"),
        (["--grammar", "latin1.lark"], "not UTF-8"),
        (["--grammar", "."], "there is no such file"),
        (["--regex", "a", "--choices", "b"], "give one of them"),
        (["--generation-config", "no.json"], "not JSON"),
        (["--generation-config", "list.json"], "not a JSON object"),
        (["--generation-config", "schema.json"], "is no generation option"),
        (["--guidance-scale", "nan"], "guidance_scale"),
        (["--negative-prompt", "x"], "guidance_scale"),
        (["--dola-layers", "middle"], "dola_layers"),
        (["--dola-layers", "[999]"], "999"),
        (["--speculation", "magic"], "'suffix'"),
        (["--speculation", "suffix", "--num-beams", "2"], "num_beams"),
        (["--draft-quantize", "int8"], "--draft-model"),
        (["--draft-model", "/no/such/folder"], "/no/such/folder"),
        (["--gpu-memory-fraction", "0.5"], "gpu_memory_fraction"),
        (["--kv-cache-tokens", "0"], "kv_cache_tokens"),
        (["--num-return-sequences", "2"], "num_return_sequences"),
        (["--num-return-sequences", "0"], "num_return_sequences"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_input_is_one_line_on_standard_error(
    handloom: Callable[..., Result], arguments: list[str], says: str
) -> None:
    result = handloom("generate", "x", "--quiet", *arguments)
    assert (result.exit_code, result.stdout) == (1, ""), result.stdout
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert says in result.stderr


def test_a_chat_has_the_same_options(pair: Pair, handloom: Callable[..., Result]) -> None:
    arguments = ("-q", "-n", 12, "--choices", "yes", "--choices", "no", "--set", "skip_special_tokens=false")
    lm, history, expected = pair.lm(), [], ""
    for message in ("Is it?", "Is it not?"):
        history.append({"role": "user", "content": message})
        text = lm.chat(history, max_new_tokens=12, choices=["yes", "no"], skip_special_tokens=False).text
        history.append({"role": "assistant", "content": text})
        expected += text + "\n"
    result = handloom("chat", *arguments, input="Is it?\nIs it not?\n")
    assert (result.exit_code, result.stdout) == (0, expected)
    plain = handloom("chat", "-q", "-n", 12, input="Hi\n").stdout
    for drafter in (["--speculation", "suffix"], ["--draft-model", pair.folder, "--draft-quantize", "int8"]):
        assert handloom("chat", "-q", "-n", 12, *drafter, input="Hi\n").stdout == plain


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--temperature", "nan"], "temperature"),
        (["--num-beams", "2"], "a conversation keeps one sequence"),
        (["--set", "self=1"], "no generation option"),
        (["--set", "sequence=1"], "no generation option"),
        (["--set", "text=1"], "no generation option"),
        (["--set", "max_length=9"], "--max-new-tokens"),
        (["--json-schema", "nowhere.json"], "no such file"),
        (["--set", "nothing=1"], "no generation option"),
        (["--stop", ""], "stop"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_chat_that_cannot_be_is_refused_before_the_first_message(
    handloom: Callable[..., Result], arguments: list[str], says: str
) -> None:
    result = handloom("chat", "--quiet", *arguments, input="never read\n")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert says in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["score", "config.json", "--model", "MODEL"],
        ["bench", "MODEL"],
        ["bench", "prefix", "MODEL"],
        ["bench", "throughput", "MODEL"],
        ["chat", "--model", "MODEL"],
    ],
    ids=" ".join,
)
def test_all_that_load_a_model_take_the_same_options(
    pair: Pair, files: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(files)
    command = [str(pair.folder) if word == "MODEL" else word for word in words]
    both = ["--kv-cache-tokens", "64", "--gpu-memory-fraction", "0.5", "--device", "cpu", "--backend", "torch"]
    result = CliRunner().invoke(app, [*command, *both, "--dtype", "float32", "--max-context", "32", "--quiet"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: kv_cache_tokens and gpu_memory_fraction") and result.stderr.count("\n") == 1


def test_a_draft_model_with_another_vocabulary_is_refused(handloom: Callable[..., Result], tmp_path: Path) -> None:
    result = handloom("generate", "x", "-q", "--draft-model", save(tiny_gpt2(vocab_size=300), tmp_path))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: assistant_model has a vocabulary of 300")
