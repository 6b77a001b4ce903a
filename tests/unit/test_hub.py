"""Models by hub id: one question, one clear answer; nothing retries for a minute."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import HfApi, try_to_load_from_cache

from tandem import hub
from tandem.config import TINY_MODEL
from tandem.errors import ConfigError

NOBODY = "http://127.0.0.1:1"


class NotFound(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def not_found() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), NotFound) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def ask(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Path) -> None:
    monkeypatch.setattr(hub, "HfApi", functools.partial(HfApi, endpoint=endpoint))
    monkeypatch.setattr(hub, "try_to_load_from_cache", functools.partial(try_to_load_from_cache, cache_dir=cache))


def test_a_directory_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HfApi", None)
    assert hub.source_of(str(TINY_MODEL)) == str(TINY_MODEL)


def test_an_unreachable_hub_means_the_cached_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    repository = tmp_path / "models--somebody--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    ask(monkeypatch, NOBODY, tmp_path)
    assert hub.source_of("somebody/model") == str(snapshot)


def test_an_unreachable_hub_and_nothing_cached_is_said_in_seconds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ask(monkeypatch, NOBODY, tmp_path)
    started_s = time.monotonic()
    with pytest.raises(ConfigError, match=r"somebody/model: .*not in the local cache, and the hub cannot be reached"):
        hub.source_of("somebody/model")
    assert time.monotonic() - started_s < 5


def test_a_model_that_the_hub_does_not_know(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, not_found: str) -> None:
    ask(monkeypatch, not_found, tmp_path)
    with pytest.raises(ConfigError, match="the hub has no such model"):
        hub.source_of("somebody/model")


def test_what_is_no_hub_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ask(monkeypatch, NOBODY, tmp_path)
    with pytest.raises(ConfigError, match="it is no hub id either"):
        hub.source_of("no such: thing")


@pytest.mark.parametrize("command", [["router", "--port", "0"], ["prefill_worker", "--router", "127.0.0.1:1"]])
def test_processes_say_it_in_one_line(command: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": NOBODY, "HF_HOME": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-m", *command, "--model", "somebody/model"],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    [line] = ran.stderr.splitlines()
    assert line.startswith("error: cannot load the model somebody/model:")
