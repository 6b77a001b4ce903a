"""The command line: flags, exit codes, one clear line on stderr, and text that is safe to show."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import NOBODY, on_a_new_terminal, one_line, tandem
from scripted_router import REPORT, ScriptedRouter, serving

from tandem.cli.console import human_bytes, printable
from tandem.cli.serve import pool_sizes
from tandem.cli.tables import spans, transfer_line
from tandem.cli.worker import parse_cpus
from tandem.errors import ConfigError, ModelNotFound, Overloaded
from tandem.timeline import Timeline
from tandem.types import Accepted, Completed, Delta, RequestReport, Token, Usage


@pytest.fixture
def router() -> Iterator[ScriptedRouter]:
    with serving(ScriptedRouter()) as started:
        yield started


def test_version() -> None:
    assert tandem("--version").stdout.startswith("tandem ")


@pytest.mark.parametrize("command", ["serve", "generate", "status", "worker", "demo", "bench"])
def test_every_command_explains_itself(command: str) -> None:
    assert tandem(command, "--help").exit_code == 0


def test_generate_prints_the_text_alone(router: ScriptedRouter) -> None:
    result = tandem("generate", "The color of dog", "--router", router.address)
    assert (result.exit_code, result.stdout, result.stderr) == (0, " can vary\n", "")


def test_generate_reads_a_prompt_from_stdin(router: ScriptedRouter) -> None:
    tandem("generate", "-", "--router", router.address, stdin="from a pipe")
    assert router.requests[0].text == b"from a pipe"


def test_generate_labels_several_choices(router: ScriptedRouter) -> None:
    result = tandem("generate", "p", "-n", "2", "--router", router.address)
    assert result.stdout == "[0] can vary\n[1] can vary\n"


def test_generate_shows_where_the_time_went_on_stderr(router: ScriptedRouter) -> None:
    result = tandem("generate", "p", "--timeline", "--router", router.address)
    assert result.stdout == " can vary\n"
    for words in ("queued", "prefill", "handoff", "decode", "25.0 ms", "4.0 KiB in 2 frames over grpc", "decode-b"):
        assert words in result.stderr


def test_generate_sends_every_flag(router: ScriptedRouter) -> None:
    flags = "--max-tokens 9 --min-tokens 2 --temperature 0.5 --top-k 3 --top-p 0.9 --min-p 0.1 --seed 4 --n 2"
    more = "--repetition-penalty 1.5 --presence-penalty 1 --frequency-penalty -1 --logit-bias 5:-2 --logit-bias 6:1"
    rest = (
        "--logprobs 3 --stop a --stop b --stop-token-id 8 --ignore-eos --keep-special-tokens --model tiny --timeout 20"
    )
    words = f"{flags} {more} {rest} --cache-salt s".split()
    assert tandem("generate", "p", *words, "--router", router.address).exit_code == 0
    sent = router.requests[0]
    assert (sent.n, list(sent.stop), sent.model, sent.cache_salt) == (2, ["a", "b"], "tiny", "s")
    assert (sent.sampling.max_tokens, sent.sampling.seed, dict(sent.sampling.logit_bias)) == (9, 4, {5: -2.0, 6: 1.0})
    assert (list(sent.sampling.stop_token_ids), sent.sampling.ignore_eos) == ([8], True)
    assert sent.sampling.logprobs == 3
    assert 15 < (router.time_left_s[0] or 0) < 21


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--top-p", "2"], "tandem: --top-p must be in (0, 1], not 2.0"),
        (["--max-tokens", "0"], "tandem: --max-tokens must be 1 or more"),
        (["--max-tokens", "9" * 20], "--max-tokens must be at most 2147483647, not 99999999999999999999"),
        (["--stop-token-id", "-1"], "tandem: --stop-token-id must be token ids"),
        (["--logit-bias", "five"], "--logit-bias takes ID:BIAS"),
        (["-n", "0"], "tandem: --n must be a whole number"),
        (["--timeout", "-1"], "tandem: --timeout must be a number of seconds above 0, not -1.0"),
    ],
)
def test_bad_values_are_usage_errors(args: list[str], words: str) -> None:
    result = tandem("generate", "p", "--router", NOBODY, *args)
    assert result.exit_code == 2
    assert words in one_line(result)


def test_an_unknown_flag_is_a_usage_error() -> None:
    result = tandem("generate", "p", "--temprature", "1")
    assert result.exit_code == 2
    assert "--temprature" in result.stderr


@pytest.mark.parametrize("command", [["generate", "p"], ["status"], ["status", "--integrity", "--json"]])
def test_no_router_is_one_clear_line(command: list[str]) -> None:
    result = tandem(*command, "--router", NOBODY)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"cannot reach a Tandem router at {NOBODY}" in one_line(result)


def test_an_overloaded_router_says_when_to_come_back(router: ScriptedRouter) -> None:
    async def refuse(request: Any, emit: Any) -> None:
        raise Overloaded("too many requests", retry_after_ms=1200)

    router.script = refuse
    result = tandem("generate", "p", "--router", router.address)
    assert result.exit_code == 1
    assert one_line(result) == "tandem: too many requests (try again in 2 s)"


def test_a_model_that_is_not_served_is_a_bad_value(router: ScriptedRouter) -> None:
    async def refuse(request: Any, emit: Any) -> None:
        raise ModelNotFound("model 'other' is not served; served: tiny")

    router.script = refuse
    result = tandem("generate", "p", "--model", "other", "--router", router.address)
    assert result.exit_code == 2
    assert one_line(result) == "tandem: model 'other' is not served; served: tiny"


def test_ctrl_c_cancels_the_call(router: ScriptedRouter) -> None:
    async def endless(request: Any, emit: Any) -> None:
        await emit(Accepted("request-1", 1))
        await emit(Delta(0, (Token(1),), "begun"))
        await asyncio.Event().wait()

    router.script = endless
    command = [sys.executable, "-m", "tandem.cli.main", "generate", "p", "--router", router.address]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as ran:
        try:
            assert ran.stdout is not None
            assert os.read(ran.stdout.fileno(), 100) == b"begun"
            ran.send_signal(signal.SIGINT)
            out, err = ran.communicate(timeout=20)
        finally:
            ran.kill()  # the end of the block would wait for one that did not listen
    assert router.cancelled.wait(5)
    assert (ran.returncode, out.strip(), err.decode().strip()) == (130, b"", "tandem: cancelled")


def test_generate_shows_log_probabilities_on_stderr(router: ScriptedRouter) -> None:
    async def two(request: Any, emit: Any) -> None:
        await emit(Accepted("request-1", 1))
        await emit(Delta(0, (Token(7, -0.5, ((7, -0.5), (3, -1.25))), Token(8, -2.0)), " can"))
        await emit(Delta(0, (Token(1, 0.0),), ""))
        await emit(Completed(Usage(1, 3)))

    router.script = two
    result = tandem("generate", "p", "--logprobs", "2", "--router", router.address)
    assert (result.exit_code, result.stdout) == (0, " can\n")
    rows = [line.split() for line in result.stderr.splitlines()[2:]]
    assert rows[0] == ["0", "7", "-0.5000", "60.65", "%", "7", "-0.5000,", "3", "-1.2500"]
    assert rows[1] == ["1", "8", "-2.0000", "13.53", "%", "'", "can'"]
    assert rows[2] == ["2", "1", "0.0000", "100.00", "%"]


def test_ctrl_c_during_the_imports_is_quiet() -> None:
    """They take half a second, and a traceback through somebody's import would say nothing."""
    code = (
        "import os, signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from tandem.cli.main import main\n"
        "main()\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, b"", b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_cannot_be_written_is_one_line(router: ScriptedRouter) -> None:
    command = [sys.executable, "-m", "tandem.cli.main", "generate", "p", "--router", router.address]
    said = "tandem: cannot write the output: No space left on device\n"
    for unbuffered in ("", "1"):
        with Path("/dev/full").open("wb") as full:
            environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
            ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment, timeout=30, check=False)
        assert (ran.returncode, ran.stderr.decode()) == (1, said)


@pytest.mark.parametrize("encoding", ["utf-8:strict", "utf-8:surrogateescape", "latin-1"])
def test_a_prompt_that_is_not_utf_8_is_one_line_in_every_locale(encoding: str) -> None:
    command = [sys.executable, "-m", "tandem.cli.main", "generate", "-", "--router", NOBODY]
    locale = {**os.environ, "PYTHONIOENCODING": encoding}
    ran = subprocess.run(command, input=b"ab\xff", capture_output=True, env=locale, timeout=30, check=False)
    assert ran.returncode == 2
    said = "tandem: cannot read the prompt from standard input: it is not valid UTF-8 at byte 2\n"
    assert ran.stderr.decode() == said


@pytest.mark.parametrize("choices", ["1", "2"])
def test_no_terminal_gets_control_characters(router: ScriptedRouter, choices: str) -> None:
    async def paint(request: Any, emit: Any) -> None:
        await emit(Accepted("request-1", 1))
        await emit(Delta(0, (Token(1),), "a\x1b[2Jb"))
        await emit(Completed(Usage(1, 1)))

    router.script = paint
    assert on_a_new_terminal("generate", "p", "-n", choices, "--router", router.address)[0].endswith("a[2Jb")


@pytest.mark.parametrize("command", [["serve"], ["worker", "--role", "both", "--router", NOBODY]])
def test_an_unknown_config_key_is_a_config_error(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("engine:\n  blocksize: 16\n")
    result = tandem(*command, "--config", str(tmp_path / "bad.yaml"))
    assert result.exit_code == 2
    assert "unknown config key engine.blocksize; did you mean engine.block_size?" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--prefill", "0", "--decode", "0"], "no workers"),
        (["--decode", "0"], "nobody would play decode"),
        (["--prefill", "1000"], "config key serve.prefill"),
        (["--model", ""], "config key model.path: must be a directory or a hub id, and is empty"),
        (["--port", "8702", "--http-port", "8702"], "router.port (--port) and router.http_port (--http-port) must not"),
        (["--address", "127.0.0.1:6379"], "--address and --wait belong to --ray"),
        (["--wait", "5"], "--address and --wait belong to --ray"),
    ],
)
def test_serve_refuses_what_cannot_be_before_it_starts(args: list[str], words: str) -> None:
    result = tandem("serve", *args)
    assert result.exit_code == 2
    assert words in one_line(result)


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        ((None, None, None), (None, None, None)),
        ((None, None, 2), (0, 0, 2)),
        ((1, None, 2), (1, 0, 2)),
        ((1, 3, 2), (1, 3, 2)),
        ((2, 3, None), (2, 3, None)),
        ((None, None, 0), (None, None, 0)),
    ],
)
def test_nobody_is_split_unasked_beside_colocated(flags: tuple[Any, Any, Any], sizes: tuple[Any, Any, Any]) -> None:
    assert tuple(pool_sizes(*flags).values()) == sizes


@pytest.mark.parametrize("text", ["zero", "", "1,", "99999", "-1"])
def test_cpus_must_be_cores_of_ours(text: str) -> None:
    with pytest.raises(ConfigError, match="--cpus"):
        parse_cpus(text)


def test_cpus_are_sorted() -> None:
    core = min(os.sched_getaffinity(0))
    assert parse_cpus(f"{core},{core}") == [core]


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert printable("a\x1b[2Jb\x07\x9bc\x7f\n\td é 猫") == "a[2Jbc\n\td é 猫"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (812, "812 B"), (1536, "1.5 KiB"), (3 << 20, "3.0 MiB"), (1 << 50, "1024.0 TiB")]
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert human_bytes(count) == text


def test_spans_add_up_to_the_whole() -> None:
    parts = spans(REPORT, 2)
    assert [part.name for part in parts] == ["queued", "prefill", "handoff", "decode"]
    assert sum(part.ms for part in parts) == 25.0
    assert "11.0 ms per token × 1" in parts[-1].note


def test_an_answer_that_ended_early_has_fewer_spans() -> None:
    report = RequestReport(Timeline({}))
    assert spans(report, 0) == []
    assert "none" in transfer_line(report)
    assert "block table" in transfer_line(RequestReport(Timeline({}), transport="local"))
