"""What a service on a Ray cluster should consist of, and what is to be done to get there. Pure; knows no Ray.

Every member of the service, the router and each worker, is made from a `Spec`: plain JSON. Two members with the same
text are the same; a member whose text has changed is replaced.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tandem import __version__
from tandem.addresses import ANY_ADDRESS, join_address
from tandem.config import TandemConfig, parse_config
from tandem.errors import ConfigError, ModelRefused, Refused, TandemError, Unavailable
from tandem.launch.pools import check_pools
from tandem.types import Role

ROUTER = "router"
# A pool's name is also that of the custom resource of which each of its workers claims 1, and of its `serve.` key.
POOLS = {
    "prefill": frozenset({Role.PREFILL}),
    "decode": frozenset({Role.DECODE}),
    "colocated": frozenset(Role),
}
# Digits of a number of workers: far above any limit on it.
MAX_DIGITS = 9
# Settings that each node fills in for itself when nobody has set them: (section, key).
_OF_THE_NODE = (("model", "path"), ("worker", "host"))


@dataclass(frozen=True)
class Spec:
    """What a member runs, and as what."""

    # The version that made it.
    tandem: str
    # A pool, or "router".
    pool: str
    # host:port that a worker joins; empty for the router.
    router: str
    # Sections of the configuration.
    settings: dict[str, dict[str, Any]]

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Raises Refused for a spec of another version: its settings may mean something else here, or nothing."""
        found = json.loads(text)
        if found["tandem"] != __version__:
            raise Refused(f"tandem is {__version__} here and {found['tandem']} where the service was started")
        return cls(**found)

    @property
    def text(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    def config(self) -> TandemConfig:
        """Raises ConfigError."""
        return parse_config(self.settings)


@dataclass(frozen=True)
class Member:
    """A member of the service as it was last seen. One that did not answer has no spec."""

    spec: str = ""
    # See tandem.launch.ray.hosted.MemberPhase; empty while it has no process, or the process does not answer.
    phase: str = ""
    address: str = ""
    worker_id: str = ""
    pid: int = 0
    node: str = ""
    error: str = ""
    # The error's, see tandem.errors; empty when Ray said it.
    code: str = ""

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Member:
        """From what a member says of itself. One of a later version may say more: it can still be told to leave."""
        return cls(**{name: value for name, value in state.items() if name in cls.__dataclass_fields__})

    @property
    def ended(self) -> bool:
        return self.phase in ("failed", "left")


@dataclass(frozen=True)
class Changes:
    """Names of members."""

    start: list[str] = field(default_factory=list)
    # To be drained and then started anew.
    replace: list[str] = field(default_factory=list)
    # To be drained.
    leave: list[str] = field(default_factory=list)


def pool_of(name: str) -> str:
    """`decode` for `decode-1`."""
    return name.partition("-")[0]


def counts_of(names: Iterable[str]) -> dict[str, int]:
    found = Counter(map(pool_of, names))
    return {pool: found[pool] for pool in POOLS}


def wanted_specs(config: TandemConfig, head: str) -> dict[str, str]:
    """Spec texts by member name. head: the head node's address. Raises ConfigError for what cannot serve."""
    check_pools(config, on_ray=True)
    router, model = config.router, config.model
    for key in ("port", "http_port"):
        if getattr(router, key) == 0:
            raise ConfigError(f"router.{key} must be fixed on a cluster, for workers and clients to find it; not 0")
    # Without it, a restarted router would be known under another name.
    model = model.model_copy(update={"name": model.served_name})
    host = router.host if "host" in router.model_fields_set else head
    address = join_address(head if host in ANY_ADDRESS else host, router.port)
    open_config = config.model_copy(
        update={"model": model, "router": router.model_copy(update={"host": host})},
    )
    specs = {ROUTER: _spec(ROUTER, "", open_config, "model", "router", "log")}
    for pool in POOLS:
        spec = _spec(pool, address, open_config, "model", "engine", "worker", "log")
        specs |= {f"{pool}-{index}": spec for index in range(getattr(config.serve, pool))}
    return specs


def _spec(pool: str, router: str, config: TandemConfig, *sections: str) -> str:
    settings = {name: getattr(config, name).model_dump() for name in sections}
    for section, key in _OF_THE_NODE:
        if section in settings and key not in getattr(config, section).model_fields_set:
            del settings[section][key]
    return Spec(__version__, pool, router, settings).text


def router_address(specs: Mapping[str, str]) -> str:
    """host:port, of wanted_specs."""
    return next(found for text in specs.values() if (found := Spec.parse(text).router))


def plan_changes(wanted: Mapping[str, str], seen: Mapping[str, Member]) -> Changes:
    """A silent member stays: it is waiting for a node or starting again, and what it runs is told once it answers."""
    return Changes(
        start=[name for name in wanted if name not in seen],
        replace=[
            name
            for name, text in wanted.items()
            if name in seen and (seen[name].ended or seen[name].spec not in ("", text))
        ],
        leave=[name for name in seen if name not in wanted],
    )


def turns_of(plan: Changes, wanted: Mapping[str, str], seen: Mapping[str, Member]) -> list[list[str]]:
    """Who is started, or replaced, together; each turn when all of the one before serve.

    One member of each pool at a time, so that pools of several serve on. All at once where the old and the new would
    not serve side by side: workers of another block size, for one, are refused beside the old ones.
    """
    if not all(seen[name].ended or _side_by_side(seen[name].spec, wanted[name]) for name in plan.replace):
        return [[*plan.start, *plan.replace]]
    turns = [plan.start.copy()]
    for name in plan.replace:
        turn = 0 if seen[name].ended else int(name.partition("-")[2] or 0)
        turns += [[] for _ in range(turn + 1 - len(turns))]
        turns[turn].append(name)
    return turns


def _side_by_side(old: str, new: str) -> bool:
    """Whether two workers, or a router and its workers, may differ in this."""
    try:
        before, after = Spec.parse(old), Spec.parse(new)
    except Refused:
        return False
    if (before.router, before.settings["model"]) != (after.router, after.settings["model"]):
        return False
    engines = before.settings.get("engine", {}), after.settings.get("engine", {})
    return all(engines[0].get(key) == engines[1].get(key) for key in ("device", "block_size"))


def cannot_serve(name: str, member: Member) -> TandemError:
    """For a member that ended before it served: ConfigError when its settings or the model are at fault."""
    if not member.error:
        return Unavailable(f"{name} was told to leave meanwhile: does somebody else change this service?")
    kind = ConfigError if member.code in (ConfigError.code, ModelRefused.code) else Refused
    return kind(f"{name} cannot serve{member.node and f' on node {member.node}'}: {member.error}")


def config_of(seen: Mapping[str, Member]) -> TandemConfig:
    """The configuration that a running service was started with; serve.*: what it has now. Raises Unavailable."""
    if not seen:
        raise Unavailable("nothing is served on this cluster: start it with `tandem serve --ray`")
    workers = [member for name, member in sorted(seen.items()) if name != ROUTER and member.spec]
    router = seen.get(ROUTER, Member())
    if not router.spec or not workers:
        silent = "the router" if not router.spec else "every worker"
        raise Unavailable(
            f"{silent} is missing or does not answer: start it with `tandem serve --ray`, or, if it is just starting "
            "again, wait some seconds"
        )
    settings = {**Spec.parse(workers[0].spec).settings, **Spec.parse(router.spec).settings}
    return parse_config({**settings, "serve": counts_of(seen)})


def parse_counts(words: Sequence[str]) -> dict[str, int]:
    """From ['prefill=3', 'decode=2']. Raises ConfigError."""
    counts: dict[str, int] = {}
    for word in words:
        pool, _, number = word.partition("=")
        if pool not in POOLS:
            raise ConfigError(f"there is no pool {pool!r}; pools are {', '.join(POOLS)}", field="pool")
        if not number.isdecimal() or len(number) > MAX_DIGITS:
            raise ConfigError(f"{pool} takes a number of workers, such as {pool}=2, not {number!r}", field=pool)
        if pool in counts:
            raise ConfigError(f"{pool} is given twice", field=pool)
        counts[pool] = int(number)
    return counts


def demand(names: Iterable[str], device: str) -> list[dict[str, float]]:
    """The resources of these members' places, for an autoscaler."""
    return [place_of(pool_of(name), device) for name in names if name != ROUTER]


def place_of(pool: str, device: str) -> dict[str, float]:
    return {pool: 1, **({"GPU": 1} if device == "cuda" else {})}


def missing(
    wanted: Mapping[str, str], seen: Mapping[str, Member], offers: Mapping[str, float], wait_s: float, device: str
) -> str:
    """Why the service is not ready. offers: the cluster's resources."""
    counts, problems = counts_of(wanted), []
    needs = Counter(resource for name in wanted if name != ROUTER for resource in place_of(pool_of(name), device))
    short = [resource for resource in needs if offers.get(resource, 0) < needs[resource]]
    for pool, count in counts.items():
        silent = [name for name in wanted if pool_of(name) == pool and not seen.get(name, Member()).phase]
        lacks = [resource for resource in place_of(pool, device) if resource in short]
        if silent and lacks:
            places = " and ".join(f"`{resource}`" for resource in lacks)
            problems.append(f"{len(silent)} of {count} {pool} workers found no node with a free {places} resource")
        elif silent:
            problems.append(
                f"{', '.join(silent)} did not come up: a node is lost or busy, or the process ends while it starts; "
                "then worker-*.err in /tmp/ray/session_latest/logs of its node says why"
            )
    for name in wanted:
        member = seen.get(name, Member())
        if member.phase == "starting":
            problems.append(f"{name} on {member.node} is still starting")
        elif name == ROUTER and not member.phase:
            problems.append("the router did not come up on the head node")
    offered = ", ".join(f"{resource} {offers.get(resource, 0):g}" for resource in (*POOLS, "GPU") if resource in offers)
    words = "; ".join(problems) or "not every worker is in the router's list"
    hint = ": add nodes or ask for fewer" if short else ""
    return f"not ready within {wait_s:g} s: {words} (the cluster's nodes offer {offered or 'none of its pools'}){hint}"
