#!/usr/bin/env bash
# Does splitting pay? Two colocated workers against one for prefill and one for decode, on the same two cores, with the
# shape of Llama-160M and random weights: long prompts under a tight TPOT, then short prompts under a loose one. What is
# tight depends on the machine, so it is said in times of what an answer takes alone.
#
# usage: benchmarks/colocated_vs_disaggregated.sh [FOLDER]
#
# Writes FOLDER/long-prompts.json and .html, FOLDER/short-prompts.json and .html (FOLDER: the working directory), and
# prints both verdicts: of five draws of arrivals each. Takes 20 minutes at most (2 of them, on a fresh checkout, to
# compile the kernels) and 14 GiB of memory; the machine must have nothing else to do.
# PYTHON: an interpreter that has tandem[serve,bench].
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
folder=${1:-.}
mkdir -p "$folder"
model=$(mktemp -d)
trap 'rm -rf "$model"' EXIT
PYTHONPATH="$here" "$python" -c 'import pathlib, sys; from shapes import write_model
write_model("160m", pathlib.Path(sys.argv[1]) / "llama-160m", weights=False)' "$model"

compare() {
  "$python" -m tandem.cli.main bench compare --model "$model/llama-160m" --load-format dummy --workers 2 "$@"
}

echo "== long prompts, tight TPOT: 320 tokens in, 20 out; TTFT at most 4 times, TPOT at most 1.6 times that of one alone"
# Steps of 336 tokens hold a whole prompt and the decodes beside it, but no large part of a second prompt, which would
# only delay the first one's token.
compare --input-len 320 --output-len 20 --goodput ttft:4x tpot:1.6x --step-tokens 64,336 \
  --num-prompts 16 --min-seconds 20 --start-rate 1 --resolution 0.5 --time-limit 720 --output "$folder/long-prompts"

echo "== short prompts, loose TPOT: 32 tokens in, 48 out; first token within 2 s, then 5 tokens/s or more"
compare --input-len 32 --output-len 48 --goodput ttft:2000 tpot:200 --step-tokens 64,512 \
  --num-prompts 60 --min-seconds 15 --start-rate 6 --resolution 0.5 --time-limit 420 --output "$folder/short-prompts"
