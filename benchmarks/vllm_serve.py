"""`vllm bench serve`, run by the Python of a virtual environment that has vLLM, under whatever name it was installed.

usage: VENV/bin/python vllm_serve.py [options of vllm bench serve]
"""

from __future__ import annotations

import argparse


def main() -> None:
    from vllm.benchmarks.serve import add_cli_args, main

    parser = argparse.ArgumentParser(description=__doc__)
    add_cli_args(parser)
    main(parser.parse_args())


if __name__ == "__main__":
    main()
