import pytest
import torch
from engine import fake


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    """The tensors here are tiny: waking threads for them costs more than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["in-turn", "ahead", "ahead-padded"])
def both_paces(request, monkeypatch):
    """Steps in turn, as on a CPU; and launched ahead, as on a GPU, also padded as for a CUDA graph."""
    monkeypatch.setattr(fake, "RUN_AHEAD", request.param != "in-turn")
    monkeypatch.setattr(fake, "PADDED", request.param == "ahead-padded")
