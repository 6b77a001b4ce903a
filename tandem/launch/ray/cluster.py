"""The service on a Ray cluster: its router and workers are detached, named actors that Ray places and starts again.

Ray does no more than that: requests, tokens and KV go their own way, and routing never waits for Ray.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray import exceptions as ray_errors
from ray._private import ray_constants
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.services import canonicalize_bootstrap_address
from ray.autoscaler.sdk import request_resources

from tandem.addresses import dialable
from tandem.client import Client, ServiceStatus
from tandem.config import TandemConfig, parse_config
from tandem.errors import ConfigError, InvalidRequest, Refused, TandemError, Unavailable
from tandem.launch.ray.member import MemberActor
from tandem.launch.ray.plan import (
    ROUTER,
    Member,
    Spec,
    cannot_serve,
    config_of,
    demand,
    missing,
    place_of,
    plan_changes,
    pool_of,
    router_address,
    turns_of,
    wanted_specs,
)
from tandem.launch.ray.reach import check_reachable, kept_standard_error

log = logging.getLogger(__name__)

NAMESPACE = "tandem"
HEAD = "node:__internal_head__"
# Tries of Ray to join, a second each: it would make 20.
JOIN_TRIES = 5
# Members that are up answer in milliseconds; one that has no process yet never does.
ANSWER_S, LONG_ANSWER_S = 3.0, 5.0
POLL_S = 0.5
# The second one is for members that were silent at first, and turn out to run what was wanted earlier.
ROUNDS = 2
# Added to the time that draining members have by themselves; a killed actor's name is free again after moments.
LEAVE_MARGIN_S, GONE_S = 15.0, 30.0

# Gets a line about what is going on.
Tell = Callable[[str], None]


class Cluster:
    """A Ray cluster, connected to, and the service on it."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._told = ""
        # Questions that were not answered yet, by name: a member without a process is asked once. One that could not
        # even be made is no more in Ray's list of names, but the question that it was made with says why.
        self._asked: dict[str, Any] = {}

    def serve(self, config: TandemConfig, wait_s: float) -> tuple[str, ServiceStatus]:
        """Brings the service to this configuration; returns when all of it serves, with the router's address.

        Raises ConfigError, Refused or Unavailable; members that this call started and that never served are gone then.
        """
        wanted = wanted_specs(config, self._head())
        for _ in range(ROUNDS):
            self._bring(wanted, config, wait_s)
            left = plan_changes(wanted, self._survey())
            if not left.replace:
                break
        else:
            raise Unavailable(f"{', '.join(left.replace)} changed meanwhile: does somebody else change this service?")
        self._retire(left.leave, config)
        self._demand(wanted, config)
        address = router_address(wanted)
        with Client(address) as client:
            return address, client.status()

    def _bring(self, wanted: Mapping[str, str], config: TandemConfig, wait_s: float) -> None:
        """Returns when all that is wanted serves; what is not wanted serves on."""
        before, started = self._survey(), list[str]()
        plan = plan_changes(wanted, before)
        try:
            self._demand([*wanted, *plan.leave], config)
            for turn in turns_of(plan, wanted, before):
                started += turn
                self._retire([name for name in turn if name in before], config)
                for name in turn:
                    self._start(name, wanted[name])
                self._wait_serving(wanted, config, wait_s)
        except BaseException:
            self._withdraw(started, before, config)
            raise

    def scale(self, counts: Mapping[str, int], wait_s: float) -> tuple[str, ServiceStatus]:
        """`serve`, with other numbers of workers than the running service has. Raises Unavailable if there is none."""
        config = config_of(self._survey())
        pools = parse_config({"serve": {**config.serve.model_dump(), **counts}}).serve
        return self.serve(config.model_copy(update={"serve": pools}), wait_s)

    def down(self) -> bool:
        """Ends the service, in order: no new requests, live ones finish within bounds. Whether there was anything."""
        seen = self._survey()
        request_resources(bundles=[])
        if not seen:
            return False
        config = TandemConfig()
        with suppress(TandemError):  # what another version of Tandem started can be ended too
            config = config_of(seen)
        self._retire([name for name in seen if name == ROUTER], config)
        self._retire([name for name in seen if name != ROUTER], config)
        return True

    # What there is.

    def _head(self) -> str:
        heads = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"] and HEAD in node["Resources"]]
        if not heads:
            raise Unavailable("the cluster has no head node that is alive")
        return str(heads[0])

    def _survey(self, patience_s: float = ANSWER_S) -> dict[str, Member]:
        """Every member by name; one that does not answer in time is silent."""
        for name in ray.util.list_named_actors():
            if name not in self._asked:
                with suppress(ValueError):  # gone this moment
                    self._asked[name] = ray.get_actor(name, NAMESPACE).state.remote()
        asked = dict(self._asked)
        if asked:
            ray.wait(list(asked.values()), num_returns=len(asked), timeout=patience_s)
        return {name: self._answer(name, ref) for name, ref in asked.items()}

    def _answer(self, name: str, ref: Any) -> Member:
        try:
            state = ray.get(ref, timeout=0)
        except ray_errors.GetTimeoutError:
            return Member()
        except ray_errors.ActorUnavailableError:
            state = {}  # starting again
        except ray_errors.RayError as error:
            place = re.search(r"\bip=([^,)]+)", str(error))
            state = {"phase": "failed", "error": _cause(error), "node": place[1] if place else ""}
        del self._asked[name]
        return Member.of(state)

    # What is done about it.

    def _start(self, name: str, spec: str) -> None:
        place = {HEAD: 0.001} if name == ROUTER else place_of(pool_of(name), Spec.parse(spec).config().engine.device)
        actor = (
            ray.remote(MemberActor)
            .options(
                name=name,
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                max_restarts=-1,
                num_cpus=0,
                num_gpus=place.pop("GPU", 0),  # Ray wants it by itself
                resources=place,
                scheduling_strategy="SPREAD",
            )
            .remote(spec)
        )
        self._asked[name] = actor.state.remote()

    def _wait_serving(self, wanted: Mapping[str, str], config: TandemConfig, wait_s: float) -> None:
        end_s = time.monotonic() + wait_s
        while True:
            seen = self._survey(POLL_S)
            for name, member in seen.items():
                if name in wanted and member.ended:
                    raise cannot_serve(name, member)
            waiting = [name for name in wanted if name not in seen or seen[name].phase != "serving"]
            if not waiting and self._routed(wanted, seen):
                return
            if time.monotonic() > end_s:
                raise Unavailable(missing(wanted, seen, ray.cluster_resources(), wait_s, config.engine.device))
            self._progress(f"{len(wanted) - len(waiting)} of {len(wanted)} serve", waiting)
            time.sleep(POLL_S)

    def _progress(self, words: str, waiting: list[str]) -> None:
        line = f"{words}; waiting for {', '.join(waiting) or 'the router to list every worker'}"
        if line != self._told:
            self._tell(line)
            self._told = line

    def _routed(self, wanted: Mapping[str, str], seen: Mapping[str, Member]) -> bool:
        """Whether the router places requests on every worker."""
        workers = {seen[name].worker_id for name in wanted if name != ROUTER}
        with suppress(TandemError), Client(router_address(wanted), timeout_s=ANSWER_S) as client:
            return workers <= {worker.worker_id for worker in client.status().workers}
        return False

    def _retire(self, names: Iterable[str], config: TandemConfig) -> None:
        """Drains members, all at once, and ends their processes when they have left or their time is up."""
        leaving = list(names)
        if not leaving:
            return
        self._tell(f"draining {', '.join(leaving)}")
        self._tell_to_leave(leaving)
        drain_s = config.router.drain_timeout_s if leaving == [ROUTER] else config.worker.drain_timeout_s
        end_s = time.monotonic() + drain_s + LEAVE_MARGIN_S
        while time.monotonic() < end_s:
            seen = self._survey(LONG_ANSWER_S)
            if not any(name in seen and seen[name].phase in ("starting", "serving") for name in leaving):
                break
            time.sleep(POLL_S)
        self._remove(leaving)

    def _tell_to_leave(self, names: Iterable[str]) -> None:
        """Workers by their router; the router, and workers that it does not know, by themselves."""
        seen, left = self._survey(), set(names)
        workers = {name: seen[name].worker_id for name in left if name in seen and seen[name].worker_id}
        with suppress(TandemError), Client(seen.get(ROUTER, Member()).address, timeout_s=ANSWER_S) as router:
            for name, worker_id in workers.items():
                with suppress(InvalidRequest):  # it has not joined, or has left
                    router.drain_worker(worker_id, timeout_s=ANSWER_S)
                    left.remove(name)
        for name in left:
            with suppress(ValueError):
                ray.get_actor(name, NAMESPACE).drain.remote()

    def _remove(self, names: Iterable[str]) -> None:
        """Ends processes, and waits until Ray has forgotten them."""
        removed = set(names)
        for name in removed:
            self._asked.pop(name, None)
        end_s = time.monotonic() + GONE_S
        while left := removed & set(ray.util.list_named_actors()):
            if time.monotonic() > end_s:
                raise Unavailable(f"Ray did not end {', '.join(sorted(left))} within {GONE_S:g} s; try again")
            for name in left:
                # Again and again: for moments Ray may take a name for that of an actor that is dead already.
                with suppress(ValueError):
                    ray.kill(ray.get_actor(name, NAMESPACE), no_restart=True)
            time.sleep(0.1)

    def _withdraw(self, started: Iterable[str], before: Mapping[str, Member], config: TandemConfig) -> None:
        """What was started and does not serve is removed, and what it was to replace starts again. Where nothing was
        before, nothing stays."""
        serving = [name for name, member in self._survey().items() if before and member.phase == "serving"]
        self._remove(name for name in started if name not in serving)
        left = set(ray.util.list_named_actors())
        lost = sorted(name for name, member in before.items() if name not in left and member.spec and not member.ended)
        for name in lost:
            self._start(name, before[name].spec)
        if lost:
            self._tell(f"starting again what served before: {', '.join(lost)}")
        self._demand([*left, *lost], config)

    def _demand(self, names: Iterable[str], config: TandemConfig) -> None:
        """What an autoscaler, where one runs, is to keep nodes for."""
        request_resources(bundles=demand(names, config.engine.device))


@contextmanager
def connected(address: str, tell: Tell) -> Iterator[Cluster]:
    """address: the head's HOST:PORT, or 'auto' for the cluster that this machine is part of. Raises TandemError."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    found = _find(address)
    check_reachable(found)
    # As `ray start` does: a token that this user has is used, unless RAY_AUTH_MODE says otherwise.
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    _connect(found)
    try:
        yield Cluster(tell)
    except ray_errors.RayError as error:
        raise Unavailable(f"Ray at {found}: {_cause(error)}") from None
    finally:
        ray.shutdown()


def _find(address: str) -> str:
    try:
        return dialable(str(canonicalize_bootstrap_address("auto")) if address == "auto" else address)
    except ConnectionError:
        raise Unavailable(
            "no Ray cluster runs on this machine: start one (`ray up cluster.yaml`, or `ray start --head`), "
            "or say where it is with --address HOST:PORT"
        ) from None
    except ValueError as error:
        raise ConfigError(f"--address takes auto or the head's HOST:PORT: {error}", field="address") from None


def _connect(address: str) -> None:
    ray_constants.NUM_REDIS_GET_RETRIES = JOIN_TRIES
    # Ray's core prints why it is refused, and says it nowhere else.
    with kept_standard_error() as said:
        try:
            ray.init(address=address, namespace=NAMESPACE, logging_level=logging.ERROR, log_to_driver=False)
        except (ConnectionError, ray_errors.RayError) as error:
            refused = any(sign in said() for sign in ("InvalidAuthToken", "Unauthenticated"))
            if refused or isinstance(error, ray_errors.AuthenticationError):
                raise Refused(
                    f"the Ray cluster at {address} refuses this user's token, or the lack of one: "
                    "~/.ray/auth_token must be the head's (or RAY_AUTH_TOKEN), and RAY_AUTH_MODE `token` or unset"
                ) from None
            raise Unavailable(f"{address} does not answer as a Ray cluster: {_cause(error)}") from None
        except (RuntimeError, ValueError) as error:  # another version of Ray or Python, a token that is missing
            raise Refused(f"cannot join the Ray cluster at {address}: {' '.join(str(error).split())}") from None


def _cause(error: BaseException) -> str:
    """Ray's errors carry tracebacks; their last line that says something is the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
