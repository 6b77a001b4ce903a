"""What a transport needs that may not be installed."""

from __future__ import annotations

from importlib.util import find_spec

# By transport: the name, modules one of which it needs, the extra of this distribution that brings it.
_NEEDED = {"ray": ("Ray", ("ray",), "ray"), "nixl": ("NIXL", ("nixl_cu12", "nixl_cu13"), "nixl")}


def installed(cases: dict[str, str]) -> list[str]:
    """Of cases and their transports those that can run; says which cannot. Ends the process if none can."""
    left = [case for case, transport in cases.items() if _can_run(case, transport)]
    if not left:
        raise SystemExit("there is nothing to measure")
    return left


def _can_run(case: str, transport: str) -> bool:
    if transport not in _NEEDED:
        return True
    name, modules, extra = _NEEDED[transport]
    if any(find_spec(module) for module in modules):
        return True
    hint = f"pip install -c constraints.txt -e '.[{extra}]' in a checkout brings it"
    print(f"left out: {case}, for {name} is not installed; {hint}", flush=True)
    return False
