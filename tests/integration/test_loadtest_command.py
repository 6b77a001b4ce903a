"""The command `tandem bench run`: its files, its exit codes, and what it says."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import scripted_openai
from paced_service import FAST, OUTPUT, Scripted, address_of, joined
from scripted_openai import ScriptedOpenAI
from scripted_router import ScriptedRouter, serving
from service import ROOT
from typer.testing import CliRunner

from tandem.cli.app import app
from tandem.errors import Overloaded


def bench(*args: str) -> list[str]:
    return [sys.executable, "-m", "tandem.cli.main", "bench", "run", *args]


def test_the_command_writes_the_keys_of_vllm(tmp_path: Path) -> None:
    wanted = {"ttft", "tpot", "itl", "e2el"}
    with address_of("grpc", Scripted([FAST])) as address:
        command = bench("--router", address, "--num-prompts", "5", "--input-len", "9", "--output-len", str(OUTPUT))
        command += ["--goodput", "ttft:500", "tpot:50", "--output", str(tmp_path / "out.json"), "--save-detailed"]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    for words in ("TTFT", "from schedule", "goodput from sending", "ttft ≤ 500 ms, tpot ≤ 50 ms", "5 answered"):
        assert words in ran.stdout
    found = json.loads((tmp_path / "out.json").read_text())
    assert {f"{head}_{name}_ms" for name in wanted for head in ("mean", "median", "std", "p99")} <= set(found)
    named = "duration completed failed total_input_tokens total_output_tokens request_throughput request_goodput"
    named += " output_throughput total_token_throughput max_output_tokens_per_s max_concurrent_requests input_lens"
    named += " output_lens ttfts itls latencies start_times queue_times errors date backend model_id num_prompts"
    assert set(named.split()) <= set(found)
    assert (found["request_rate"], found["goodput"]) == ("inf", {"ttft": 500, "tpot": 50})
    assert found["output_lens"] == [OUTPUT] * 5
    assert found["phases_ms"][0]["first_token"] == 12.0


def test_ctrl_c_gives_the_report_so_far(tmp_path: Path) -> None:
    asked = threading.Event()

    async def first_only(request: Any, emit: Any) -> None:
        if len(router.requests) > 1:
            asked.set()
            await asyncio.Event().wait()
        await Scripted([FAST]).by_grpc(request, emit)

    router = ScriptedRouter(first_only, joined())
    output = tmp_path / "out.json"
    with serving(router):
        command = bench("--router", router.address, "--num-prompts", "50", "--request-rate", "2", "--input-len", "4")
        ran = subprocess.Popen(
            [*command, "--output", str(output)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            assert asked.wait(30)
            os.kill(ran.pid, signal.SIGINT)
            out, err = ran.communicate(timeout=20)
        finally:
            ran.kill()
            ran.wait()
    assert (ran.returncode, err) == (130, "")
    assert "requests were not offered any more" in out
    found = json.loads(output.read_text())
    assert found["interrupted"] is True
    assert found["offered"] + found["not_offered"] == 50
    assert found["failures"] == {"interrupted": found["offered"] - found["completed"]}


def test_no_answer_at_all_is_a_failure(tmp_path: Path) -> None:
    async def refuse(request: Any, emit: Any) -> None:
        raise Overloaded("full")

    output = tmp_path / "out.json"
    with serving(ScriptedRouter(refuse, joined())) as router:
        command = ["bench", "run", "--router", router.address, "--num-prompts", "3", "--input-len", "4"]
        result = CliRunner().invoke(app, [*command, "--output", str(output)])
    words = "tandem: no request was answered; the first ended in overloaded: full\n"
    assert (result.exit_code, result.stderr) == (1, words)
    assert "failed: overloaded    3, the first: full" in result.stdout
    found = json.loads(output.read_text())
    assert (found["failed"], found["mean_ttft_ms"]) == (3, None)
    assert (found["failures"], found["first_errors"]) == ({"overloaded": 3}, {"overloaded": "full"})


def test_what_a_stranger_said_of_a_failure_is_shown_harmlessly() -> None:
    said = json.dumps({"error": {"message": "[bold]no\x1b[2J\nthis way" + "!" * 1000}})
    with scripted_openai.serving(ScriptedOpenAI(refusal=(400, said))) as endpoint:
        command = ["bench", "run", "--openai", endpoint.url, "--num-prompts", "2", "--input-len", "4"]
        result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "failed: http_400      2, the first: [bold]no [2J this way!!!" in result.stdout
    assert "the first ended in http_400: [bold]no [2J this way!!!" in result.stderr
    assert max(map(len, result.stdout.splitlines())) < 400


@pytest.mark.parametrize("key", ["a\nb", "secret\n", "a\udcff"])
def test_a_key_that_cannot_be_sent_is_refused_without_being_told(key: str) -> None:
    with scripted_openai.serving(ScriptedOpenAI()) as endpoint:
        command = ["bench", "run", "--openai", endpoint.url]
        by_option = CliRunner().invoke(app, [*command, "--api-key", key])
        by_variable = CliRunner().invoke(app, command, env={"OPENAI_API_KEY": key})
    for result in (by_option, by_variable):
        words = "tandem: --api-key (or OPENAI_API_KEY) holds a line end or another character that cannot be sent\n"
        assert (result.exit_code, result.stderr) == (2, words)
    assert endpoint.requests == []


def test_token_ids_that_the_model_does_not_know_are_refused_before_any_load() -> None:
    with serving(ScriptedRouter(Scripted([FAST]).by_grpc, joined())) as router:
        result = CliRunner().invoke(app, ["bench", "run", "--router", router.address, "--vocab-size", "99999"])
    assert (result.exit_code, router.requests) == (2, [])
    assert "--vocab-size must be at most 500, as many token ids as scripted knows, not 99999" in result.stderr


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--workload", "mooncake", "--trace", "/nope"], 2, "cannot read the trace /nope"),
        (["--goodput", "itl:5"], 2, "--goodput takes ttft, tpot and e2el"),
        (["--goodput", "ttft:4x"], 2, "for `tandem bench compare`"),
        (["--request-rate", "0"], 2, "--request-rate must be above 0"),
        (["--workload", "azure"], 2, "--workload azure needs --trace FILE"),
        (["--ramp-up-strategy", "linear"], 2, "go together"),
        (["--save-detailed"], 2, "--save-detailed belongs to --output"),
        (["--output", "/nowhere/x.json"], 2, "cannot write /nowhere/x.json"),
        (["--timeout", "nan"], 2, "--timeout must be a number of seconds above 0"),
        (["--temperature", "nan"], 2, "--temperature must be in [0, 100], not nan"),
        (["--temperature", "-1"], 2, "--temperature must be in [0, 100], not -1.0"),
        (["--openai", "http://127.0.0.1:99999"], 2, "not 'http://127.0.0.1:99999': port out of range 0-65535"),
        (["--openai", "http://127.0.0.1:0"], 2, "nobody listens on port 0"),
        (["--openai", "http://"], 2, "--openai takes a URL such as http://host:8000, not 'http://': it names no host"),
        (["--openai", "http://[::1"], 2, "not 'http://[::1': invalid IPv6 URL"),
        (["--openai", "http://a:b@127.0.0.1:1", "--api-key", "k"], 2, "the URL of --openai has a user name"),
        (["--openai", "127.0.0.1:8701"], 2, "--openai takes a URL such as http://host:8000, not '127.0.0.1:8701'"),
        (["--router", "127.0.0.1:1"], 1, "cannot reach a Tandem router at 127.0.0.1:1"),
        (
            ["--openai", "http://127.0.0.1:1"],
            1,
            "cannot reach an OpenAI endpoint at http://127.0.0.1:1: Connection refused",
        ),
    ],
)
def test_what_cannot_be_is_one_line(args: list[str], code: int, words: str) -> None:
    result = CliRunner().invoke(app, ["bench", "run", *args])
    lines = result.stderr.splitlines()
    assert (result.exit_code, len(lines)) == (code, 1), result.stderr
    assert words in lines[0]


def test_a_run_that_fails_leaves_no_empty_file(tmp_path: Path) -> None:
    older = tmp_path / "older.json"
    older.write_text("{}")
    for output in (tmp_path / "new.json", older):
        command = ["bench", "run", "--router", "127.0.0.1:1", "--output", str(output)]
        assert CliRunner().invoke(app, command).exit_code == 1
    assert list(tmp_path.iterdir()) == [older]
    assert older.read_text() == "{}"
