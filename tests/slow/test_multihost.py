"""Jobs over two hosts (network namespaces): the same curve, pulled cables, a host that dies."""

import pytest

import fault_hosts
import launch_jobs
from fault_hosts import INTERVAL, TIMEOUT_S
from faults import Scene


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp("hosts")
    return Scene(launch_jobs.write_config(folder), folder, fresh=False)


def test_two_hosts_have_the_curve_of_one(scene: Scene) -> None:
    """Bit for bit, with a slow rendezvous and a cable that is out for ten seconds on the way.

    When it stays out the job ends, on both hosts, with an error, in the time that was set; nothing
    before is lost.
    """
    out, lost = fault_hosts.cables(scene)
    assert out.difference == lost.difference == 0.0
    assert lost.stop_s < TIMEOUT_S + 60
    assert lost.lost < 2 * INTERVAL  # one may have been on its way to the disk


def test_a_host_dies_and_another_comes(scene: Scene) -> None:
    """--nnodes=1:2: the rest goes on with fewer ranks, and then with more, to the same losses."""
    for outcome in fault_hosts.hosts_that_come_and_go(scene):
        assert outcome.lost <= 2 * INTERVAL
        assert outcome.difference < 1e-3
