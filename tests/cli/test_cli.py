"""The commands as a user types them: options, aliases, streams, exit codes, one clear line per error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cli import main
from localspec.schedule import store

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--max-tokens", "8", "--context", "256", "--backend", "llamacpp", "--seed", "1"]


def run(*arguments: str, text: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, list(arguments), input=text)


def report(*arguments: str, text: str | None = None) -> dict[str, Any]:
    result = run("generate", "--json", *arguments, *QUICK, text=text)
    assert result.exit_code == 0, result.output
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def assert_one_line(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert "Traceback" not in result.output
    for word in words:
        assert word in lines[0], lines[0]


# ---------------------------------------------------------------- help


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['localspec', '--help']\n"
        "from cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'rich', 'mlx', 'llama_cpp', 'jinja2', 'prompt_toolkit'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    for command in ("chat", "generate", "pairs", "trace", "doctor", "bench"):
        assert command in done.stdout


@pytest.mark.slow
@pytest.mark.real
def test_exactness_is_chosen_reported_and_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert report("Hello")["exact"] == "class"
    off = report("Hello", "--exact", "off", "--plain")
    assert (off["exact"], off["stats"]["widths"], off["bound"]) == ("off", {"1": off["stats"]["num_rounds"]}, None)
    with monkeypatch.context() as patch:
        patch.setattr(store, "_automatic", True)
        patch.setenv("LOCALSPEC_MEASURE", "1")
        guarded = [report("Hello", "--exact", "guarded", *more) for more in (["--plain"], ["--drafter", "draft_model"])]
    assert guarded[0]["text"] == guarded[1]["text"] and guarded[0]["bound"] > 0.0
    assert {one["exact"] for one in guarded} == {"guarded"}
    assert_one_line(run("generate", "Hello", "--exact", "guarded", "--acceptance", "rejection", *QUICK), 2, "guarded")
    assert run("generate", "Hello", "--exact", "sometimes").exit_code == 2


@pytest.mark.parametrize(
    "command",
    [
        "chat",
        "generate",
        "pairs",
        "pairs search",
        "pairs show",
        "pairs check",
        "trace",
        "doctor",
        "bench",
        "bench speed",
        "bench equality",
        "bench core",
    ],
)
def test_every_command_has_help(command: str) -> None:
    assert run(*command.split(), "--help").exit_code == 0


# ---------------------------------------------------------------- generate


@pytest.mark.real
def test_generate_streams_the_answer_and_a_summary() -> None:
    result = run("generate", "What is 4 * 78?", *QUICK)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()
    assert "tokens/s" in result.stderr and "seed 1" in result.stderr


@pytest.mark.real
@pytest.mark.parametrize(
    "settings", [["--temp", "0"], ["--temperature", "0.8"], ["--temp", "0.8", "--top-k", "20", "--top-p", "0.9"]]
)
def test_speculative_text_equals_plain_text(settings: list[str]) -> None:
    arguments = ["Write a Python function.", *settings]
    fast, plain = report(*arguments), report(*arguments, "--plain")
    assert fast["tokens"] == plain["tokens"]
    assert fast["stats"]["num_drafted"] > 0 and plain["stats"]["num_drafted"] == 0
    assert plain["plain_because"] and fast["plain_because"] is None


@pytest.mark.real
def test_a_prompt_may_come_from_argument_file_or_standard_input(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("Say hello.", encoding="utf-8")
    texts = {
        report("Say hello.")["text"],
        report("--file", str(path))["text"],
        report(text="Say hello.")["text"],
        report("-", text="Say hello.")["text"],
    }
    assert len(texts) == 1


@pytest.mark.real
def test_raw_continues_the_text_and_a_system_message_changes_the_prompt() -> None:
    raw, chat, system = report("def f(x):", "--raw"), report("def f(x):"), report("def f(x):", "--system", "Be brief.")
    assert raw["num_prompt_tokens"] < chat["num_prompt_tokens"] < system["num_prompt_tokens"]


@pytest.mark.real
@pytest.mark.parametrize(
    "spelling",
    [
        ["--num-draft", "2"],
        ["--num-draft-tokens", "2"],
        ["--spec-draft-n-max", "2"],
        ["--draft-max", "2"],
        ["--draft-n", "2"],
        ["--drafter", "draft_model:num=2"],
        ["--spec-type", "draft-simple", "--draft-max", "2"],
    ],
)
def test_other_programs_spellings_mean_the_same(spelling: list[str]) -> None:
    stats = report("Count to ten.", *spelling)["stats"]
    assert stats["num_drafted"] <= 2 * stats["num_rounds"] and "draft_model" in stats["drafted_by_source"]


@pytest.mark.real
@pytest.mark.parametrize("spelling", ["--draft", "-md", "--draft-model", "--model-draft", "--spec-draft-model"])
def test_draft_models_may_be_named_as_elsewhere(spelling: str) -> None:
    folder = ROOT / "models" / "tiny"
    answer = report("Hello", "-m", str(folder / "target.gguf"), spelling, str(folder / "draft.gguf"))
    assert answer["draft"]["path"].endswith("draft.gguf") and answer["drafter"] == "auto"


@pytest.mark.real
def test_flash_attention_has_its_short_name() -> None:
    assert report("Hello", "-fa")["text"]


@pytest.mark.real
def test_a_path_alone_has_no_draft_model_so_auto_looks_up() -> None:
    answer = report("Hello", "--target", str(ROOT / "models" / "tiny" / "target.gguf"))
    assert answer["draft"] is None and answer["drafter"] == "auto"
    assert set(answer["stats"]["drafted_by_source"]) <= {"ngram"}


@pytest.mark.real
def test_logprobs_stops_and_biases_reach_the_answer() -> None:
    answer = report("What is 4 * 78?", "--logprobs", "2")
    assert len(answer["logprobs"]) == len(answer["tokens"]) and len(answer["logprobs"][0]["top"]) == 2
    first = answer["text"][:3]
    assert report("What is 4 * 78?", "--stop", first)["text"] == ""
    banned = answer["tokens"][0]
    assert report("What is 4 * 78?", "--logit-bias", f"{banned}=-100")["tokens"][0] != banned


@pytest.mark.real
def test_show_drafts_colours_tokens_even_into_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    result = run("generate", "What is 4 * 78?", "--show-drafts", *QUICK)
    assert "\x1b[1;32m" in result.stdout


@pytest.mark.real
def test_rejection_can_be_asked_for() -> None:
    assert report("Hello", "--acceptance", "rejection", "--temp", "1")["acceptance"] == "rejection"


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--temperature", "-1"], 2, ["temperature", "-1"]),
        (["--top-p", "1.5"], 2, ["top_p", "1.5"]),
        (["--top-p", "0"], 2, ["top_p"]),
        (["--min-p", "2"], 2, ["min_p"]),
        (["--seed", "-5"], 2, ["seed"]),
        (["--drafter", "ngrams"], 2, ["Did you mean 'ngram'"]),
        (["--drafter", "ngram:nmu=3"], 2, ["Did you mean 'num'"]),
        (["--backend", "lamacpp"], 2, ["Did you mean 'llamacpp'"]),
        (["--acceptance", "wlak"], 2, ["Did you mean 'walk'"]),
        (["--target", "no-such-file.gguf"], 1, ["no such file", "no-such-file.gguf"]),
        (["--target", "some-org/some-model"], 1, ["Hub id", "localspec pull some-org/some-model"]),
        (["--target", "tiyn"], 2, ["Did you mean 'tiny'"]),
        (["--logit-bias", "x"], 2, ["TOKEN_ID=NUMBER"]),
        (["--plain", "--num-draft", "3"], 2, ["--plain"]),
        (["--spec-type", "ngram-mod", "--drafter", "ngram"], 2, ["--spec-type"]),
        (["--logprobs", "3"], 2, ["--json"]),
        (["--json", "--show-drafts"], 2, ["--show-drafts", "--json"]),
        (["--raw", "--system", "x"], 2, ["--system"]),
        (["--dtype", "float16", "--backend", "llamacpp"], 2, ["dtype"]),
        (["--file", "no-such-prompt.txt"], 2, ["twice"]),
    ],
)
def test_wrong_options_are_one_line_and_the_right_exit_code(arguments: list[str], code: int, words: list[str]) -> None:
    assert_one_line(run("generate", "Hello", *arguments), code, *words)


@pytest.mark.parametrize(
    ("text", "words"), [(b"", "empty"), (b"  \n", "empty"), (b"caf\xe9 au lait", "0xe9 at offset 3")]
)
def test_prompts_that_are_empty_or_not_utf8_are_refused(text: bytes, words: str) -> None:
    assert_one_line(run("generate", text=text), 2, words)


def test_a_prompt_file_that_is_missing_is_refused() -> None:
    assert_one_line(run("generate", "--file", "no-such-prompt.txt"), 1, "no-such-prompt.txt")


@pytest.mark.real
def test_a_prompt_longer_than_the_context_is_refused() -> None:
    assert_one_line(run("generate", "word " * 500, *QUICK), 2, "too long", "--context")


def test_debug_shows_the_traceback() -> None:
    result = run("--debug", "generate", "Hello", "--temperature", "-1")
    assert isinstance(result.exception, Exception) and "temperature" in str(result.exception)


# ---------------------------------------------------------------- doctor and bench


@pytest.mark.real
def test_doctor_reports_both_backends() -> None:
    text = run("doctor")
    assert text.exit_code == 0 and "bundled pair: tiny" in text.stdout
    data = json.loads(run("doctor", "--json").stdout)
    assert {backend["name"] for backend in data["backends"]} == {"llamacpp", "mlx"}


@pytest.mark.real
@pytest.mark.slow
def test_bench_equality_compares_and_says_so() -> None:
    result = run("bench", "equality", "--per-domain", "1", "--tokens", "8", "--backend", "llamacpp")
    assert result.exit_code == 0, result.output
    assert "12 of 12 runs equal plain decoding" in result.stdout


def test_bench_core_prints_the_cores_time() -> None:
    result = run("bench", "core", "--vocabulary", "2000", "--rounds", "5")
    assert result.exit_code == 0 and "| greedy |" in result.stdout


# ---------------------------------------------------------------- chat


def chat(lines: str, *arguments: str) -> Result:
    return run("chat", *QUICK, *arguments, text=lines)


@pytest.mark.real
def test_chat_answers_and_carries_out_commands() -> None:
    script = (
        "What is 4 * 78?\n/stats\n/seed 5\n/plain\nWhat is 4 * 78?\n/drafts\n/reset\n/help\n/nonsense\n/exit\nlost\n"
    )
    result = chat(script, "--temperature", "0")
    assert result.exit_code == 0, result.output
    for words in ("target", "drafter auto", "tokens per round", "drafter: nothing", "forgotten", "unknown command"):
        assert words in result.stdout
    assert result.stdout.count("tokens/s ·") == 2


@pytest.mark.real
def test_plain_says_the_same_words_in_chat() -> None:
    script = "Say hello.\n/reset\n/plain\nSay hello.\n"
    lines = chat(script, "--temperature", "0.8").stdout.split("/help")[1].splitlines()
    answers = [line for line in lines if line.strip()]
    start = answers.index("drafter: nothing")
    assert answers[: start - 2] == answers[start + 1 : -1] != []


@pytest.mark.real
def test_lines_that_end_in_a_backslash_go_on() -> None:
    result = chat("one \\\ntwo\n")
    assert result.stdout.count("tokens/s ·") == 1


@pytest.mark.real
def test_a_conversation_that_outgrows_the_context_says_what_to_do() -> None:
    result = chat("word " * 400 + "\nHi\n")
    assert result.exit_code == 0
    assert "too long" in result.stdout and "/reset" in result.stdout
    assert result.stdout.count("tokens/s ·") == 1, "the conversation goes on after the refusal"


@pytest.mark.real
@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to a child process")
def test_interrupting_an_answer_leaves_the_chat_usable() -> None:
    command = [sys.executable, "-u", "cli.py", "chat", "--backend", "llamacpp", "--ignore-eos", "--seed", "1"]
    child = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=0
    )
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write("Tell me a long story.\n")
    shown = ""
    while "/help" not in shown:
        shown += child.stdout.read(1)
    while len(shown.partition("/help")[2].strip()) < 5:  # the answer has begun
        shown += child.stdout.read(1)
    child.send_signal(signal.SIGINT)
    time.sleep(0.2)
    out, err = child.communicate("/stats\n/exit\n", timeout=60)
    assert child.returncode == 0, err
    assert "cancelled" in out and "tokens per round" in out
