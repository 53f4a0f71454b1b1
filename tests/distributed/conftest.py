import pytest

from tests.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def pool():
    """Four processes (or another number) for all tests of this folder; new ones after a failure."""
    pools: dict[int, Ranks] = {}

    def get(count: int = 4) -> Ranks:
        if count not in pools or not pools[count].alive:
            pools[count] = Ranks(count)
        return pools[count]

    yield get
    for each in pools.values():
        if each.alive:
            each.close()


@pytest.fixture
def run(pool):
    return pool().run
