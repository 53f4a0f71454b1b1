import pytest

from tests.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def pool():
    """Four processes for all tests of this folder; new ones after a failure."""
    pools = []

    def get() -> Ranks:
        if not pools or not pools[-1].alive:
            pools.append(Ranks())
        return pools[-1]

    yield get
    if pools and pools[-1].alive:
        pools[-1].close()


@pytest.fixture
def run(pool):
    return pool().run
