from __future__ import annotations

import pytest
from hosts import missing_for_hosts


@pytest.fixture(autouse=True, scope="session")
def _hosts_can_be_built() -> None:
    missing = missing_for_hosts()
    if missing:
        pytest.skip(f"hosts need {missing}; `make test-cluster` says more")
