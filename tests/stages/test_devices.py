"""Devices: which of several one process of a machine uses. There is none here, so torch is told that there are two."""

from __future__ import annotations

import os

import pytest
import torch

from pipeline.cluster import Dask, connect
from stages.devices import pick_device, sharing


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return monkeypatch


def test_each_local_worker_has_its_own_device_also_when_it_is_started_again() -> None:
    def place() -> tuple[int, list[str]]:
        """In a worker: its process, and the devices that it picks."""
        torch.cuda.is_available = lambda: True
        torch.cuda.device_count = lambda: 2
        return os.getpid(), [str(pick_device(name)) for name in ("auto", "cuda", "cuda:1", "cpu")]

    with connect(workers=3) as cluster:
        assert isinstance(cluster, Dask)
        before = cluster.client.run(place)
        assert sorted(devices for _, devices in before.values()) == [
            ["cuda:0", "cuda:0", "cuda:1", "cpu"],
            ["cuda:0", "cuda:0", "cuda:1", "cpu"],
            ["cuda:1", "cuda:1", "cuda:1", "cpu"],
        ]
        cluster.client.restart()
        after = cluster.client.run(place)
        assert sorted(devices for _, devices in after.values()) == sorted(devices for _, devices in before.values())
        assert not {process for process, _ in before.values()} & {process for process, _ in after.values()}


def test_processes_of_a_machine_take_devices_in_turn(two: pytest.MonkeyPatch) -> None:
    assert str(pick_device("auto")) == "cuda"
    two.setenv("LOCAL_WORLD_SIZE", "4")
    for rank, device in enumerate(["cuda:0", "cuda:1", "cuda:0", "cuda:1"]):
        two.setenv("LOCAL_RANK", str(rank))
        assert [str(pick_device(name)) for name in ("auto", "cuda", "cuda:1")] == [device, device, "cuda:1"]


def test_memory_is_shared_by_those_who_use_one_device(two: pytest.MonkeyPatch) -> None:
    assert [sharing(torch.device("cuda"), processes) for processes in (1, 2, 3, 8)] == [1, 1, 2, 4]
    assert sharing(torch.device("cuda:1"), 3) == 3
    assert sharing(torch.device("cpu"), 3) == 3
