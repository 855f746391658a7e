"""A cluster of Ray on this machine, with two CPUs: once for the folder. Without ray, what needs it is skipped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

from moesteer.backends.ray import cluster


@pytest.fixture(scope="package")
def ray_cluster() -> Iterator[None]:
    """Joined by what the tests load; each worker has one CPU, and so one thread, whatever the machine has."""
    if find_spec("ray") is None:  # not imported here: Ray takes up its token when it is
        pytest.skip("ray is not installed")
    before = os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)  # of the local runs that the workers are compared with: last bits may depend on it
    with cluster.joined(workers=2):
        yield
    torch.set_num_threads(before[1])
    if before[0] is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before[0]
