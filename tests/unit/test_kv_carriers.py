"""The table of carriers, and a configuration that names none of them."""

from __future__ import annotations

import pytest

from kv_transfer.carriers.table import CARRIERS, carrier_class, make_carriers
from kv_transfer.ends.carrier import PoolMemory
from tandem.config import parse_config
from tandem.errors import ConfigError
from tandem.launch.pools import check_pools


def test_each_line_of_the_table_is_a_carrier_of_that_name_with_a_call_of_its_own() -> None:
    classes = [carrier_class(name) for name in CARRIERS]
    assert [carrier.name for carrier in classes] == [*CARRIERS]
    assert len({carrier.method for carrier in classes}) == len(classes)


@pytest.mark.parametrize("roles", [{"prefill": 1, "decode": 1}, {"prefill": 0, "decode": 0, "colocated": 1}])
def test_a_name_that_no_carrier_has_is_refused_by_the_service_and_by_a_worker(roles: dict[str, int]) -> None:
    config = parse_config({"router": {"transport": "pigeon"}, "serve": roles})
    said = "config key router.transport: must be one of auto, grpc, shm, nixl, ray, not 'pigeon'"
    for refuse in (lambda: check_pools(config, False), lambda: make_carriers(config, PoolMemory("cpu"))):
        with pytest.raises(ConfigError) as caught:
            refuse()
        assert (caught.value.message, caught.value.field) == (said, "router.transport")


def offered(memory: PoolMemory) -> set[str]:
    """But for ray, which depends on the process that the test runs in."""
    return {carrier.name for carrier in make_carriers(parse_config({}), memory)} - {"ray"}


def test_the_pool_is_shared_memory_where_kv_comes_into_it_and_not_where_it_only_leaves() -> None:
    sending, receiving = PoolMemory("cpu", receives=False), PoolMemory("cpu")
    assert offered(sending) == offered(receiving) == {"grpc", "shm"}
    assert sending.allocate is None
    assert receiving.allocate is not None
    assert offered(PoolMemory("cuda")) == {"grpc"}
    assert offered(PoolMemory("cuda", receives=False)) == {"grpc", "shm"}
