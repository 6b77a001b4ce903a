"""Prompts are transformers': token ids and rendered chats of a router without torch, beside AutoTokenizer's with it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from template_corpus import CONVERSATIONS, IN_PARTS, PARTS, TEMPLATES
from tokenizer_zoo import MAKERS, TEXTS, edit, make

ROOT = Path(__file__).parents[2]
# Where templates of many kinds are added.
TEMPLATED = "named tokens"


def ask_router(cases: dict[str, tuple[list[str], list[Any]]]) -> dict[str, Any]:
    """Of every folder, in one process that must not load torch."""
    ran = subprocess.run(
        [sys.executable, ROOT / "tests/support/router_prompts.py"],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=100,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def reference(folder: str | Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def rendered(tokenizer: Any, messages: list[Any]) -> Any:
    """The text, or whatever was raised."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        return error


SOME_PARTS = {
    printed: "{% for m in messages %}{% if m.role == 'user' %}{% for p in m.content %}<{{ p.text }}>{% endfor %}"
    "{% else %}" + printed + "{% endif %}{% endfor %}"
    for printed in ("{{ m.content }}", "{{ '' + m.content }}", "{{ m.content.strip('x') }}")
}
# Of chat templates: transformers reads chat_template.json for processors only.
PLACES = ["none", "config", "config list, default", "config list", "file", "config, file", "folder", "file, folder"]
PLACES += ["processor", "config list, default, folder, processor", "config, number"]


def put(folder: Path, place: str) -> Path:
    """Templates in these places."""
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D{{ messages[0].content }}"}]
    if "config" in place:
        found: Any = named[: 2 if "default" in place else 1] if "list" in place else "C{{ bos_token }}"
        found = 5 if "number" in place else found
        edit(folder / "tokenizer_config.json", lambda settings: settings.update(chat_template=found))
    if "file" in place:
        (folder / "chat_template.jinja").write_text("F")
    if "folder" in place:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("A")
    if "processor" in place:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": "P"}))
    return folder


def templated(folder: Path, template: str) -> Path:
    make(TEMPLATED, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def _with_own_code(folder: Path) -> None:
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    edit(folder / "tokenizer_config.json", lambda found: found.update(own))


# What is done to a tokenizer's files → words of the refusal.
SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "broken": (lambda folder: (folder / "tokenizer.json").write_text("{"), "its tokenizer.json cannot be read"),
    "written in Python": (
        lambda folder: edit(
            folder / "tokenizer_config.json", lambda found: found.update(tokenizer_class="ByT5Tokenizer")
        ),
        "ByT5Tokenizer is no fast one",
    ),
    "code of its own": (_with_own_code, "transformers cannot load it"),
    "no vocabulary": (lambda folder: (folder / "tokenizer.json").unlink(), "comes without any vocabulary"),
}


def slug(name: str) -> str:
    return re.sub(r"\W+", "-", name)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By folder name: what the router makes of it, and the folder. One process for all: it takes a second to start."""
    root = tmp_path_factory.mktemp("models")
    cases: dict[str, tuple[list[str], list[Any]]] = {}
    for name in MAKERS:
        cases[str(make(name, root / slug(name)))] = (TEXTS, [])
    for name, template in TEMPLATES.items():
        cases[str(templated(root / f"template-{slug(name)}", template))] = ([], CONVERSATIONS)
    for name, (template, _) in PARTS.items():
        cases[str(templated(root / f"parts-{slug(name)}", template))] = ([], [IN_PARTS])
    for name, template in SOME_PARTS.items():
        conversation = [{**IN_PARTS[0], "role": "system"}, *IN_PARTS, {**IN_PARTS[0], "role": "assistant"}]
        cases[str(templated(root / f"some-parts-{slug(name)}", template))] = ([], [conversation])
    for place in PLACES:
        cases[str(put(make(TEMPLATED, root / f"place-{slug(place)}"), place))] = ([], CONVERSATIONS[:1])
    for name, (spoil, _) in SPOILED.items():
        folder = make("tiny", root / f"spoiled-{slug(name)}")
        spoil(folder)
        cases[str(folder)] = ([], [])
    found = ask_router(cases)
    return {Path(folder).name: {**found[folder], "folder": folder} for folder in found}


@pytest.mark.parametrize("name", MAKERS)
def test_ids_are_autotokenizer_s(answers: dict[str, Any], name: str) -> None:
    found = answers[slug(name)]
    tokenizer = reference(found["folder"])
    assert found["ids"] == [tokenizer(text)["input_ids"] for text in TEXTS]
    decoded = [[tokenizer.decode(ids, skip_special_tokens=skip) for skip in (True, False)] for ids in found["ids"]]
    assert found["streamed"] == decoded
    for text, token_id in found["special_tokens"].items():
        assert (tokenizer.convert_ids_to_tokens(token_id), tokenizer.decode([token_id], True)) == (text, "")


@pytest.mark.parametrize("name", TEMPLATES)
def test_chats_are_apply_chat_template_s(answers: dict[str, Any], name: str) -> None:
    found = answers[f"template-{slug(name)}"]
    tokenizer = reference(found["folder"])
    for messages, ours in zip(CONVERSATIONS, found["chats"], strict=True):
        theirs = rendered(tokenizer, messages)
        if isinstance(theirs, Exception):
            assert str(theirs)[:60] in ours["error"]
            continue
        assert ours["text"] == theirs
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ours["ids"] == ids


@pytest.mark.parametrize("name", PARTS)
def test_parts_stay_parts_where_the_template_looks_at_them(answers: dict[str, Any], name: str) -> None:
    found = answers[f"parts-{slug(name)}"]
    lines = [{**each, "content": "\n".join(part["text"] for part in each["content"])} for each in IN_PARTS]
    theirs = rendered(reference(found["folder"]), IN_PARTS if PARTS[name][1] else lines)
    assert [each["text"] for each in found["chats"]] == [theirs]


@pytest.mark.parametrize("name", SOME_PARTS)
def test_parts_are_for_those_messages_whose_parts_are_looked_at(answers: dict[str, Any], name: str) -> None:
    (chat,) = answers[f"some-parts-{slug(name)}"]["chats"]
    assert chat["text"] == "one \ntwo<one ><two>one \ntwo"


@pytest.mark.parametrize("place", PLACES)
def test_a_template_is_found_wherever_transformers_looks(answers: dict[str, Any], place: str) -> None:
    found = answers[f"place-{slug(place)}"]
    theirs = rendered(reference(found["folder"]), CONVERSATIONS[0])
    (ours,) = found["chats"]
    assert (ours == "no template") if isinstance(theirs, Exception) else (ours["text"] == theirs)


@pytest.mark.parametrize("name", SPOILED)
def test_what_would_not_be_served_exactly_is_refused_by_name(answers: dict[str, Any], name: str) -> None:
    refused = answers[f"spoiled-{slug(name)}"]["refused"]
    assert refused.startswith(f"spoiled-{slug(name)} is refused: its tokenizer")
    assert SPOILED[name][1] in refused


def test_a_model_without_a_tokenizer_is_served_by_ids(tmp_path: Path) -> None:
    from tandem.config import ModelConfig
    from tandem.tokenizer import load_tokenizer

    assert load_tokenizer(ModelConfig(path=str(tmp_path))) is None
