"""The guards that the other tests rely on."""

import socket

import jaxtyping
import pytest
import torch
from tiny import ARCHITECTURES, TASKS, available, tiny_batch, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("method", ["connect", "connect_ex"])
def test_no_test_reaches_the_network(method):
    with socket.socket() as connection, pytest.raises(RuntimeError, match="no network"):
        getattr(connection, method)(("192.0.2.1", 80))  # TEST-NET-1: reserved, never routed


def test_loopback_stays_open():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()[:2]) as client:
        client.sendall(b"x")
        with server.accept()[0] as accepted:
            assert accepted.recv(1) == b"x"


def test_annotations_of_the_measures_are_enforced():
    from graftlm.measure.fisher import fisher_trace

    with pytest.raises(jaxtyping.TypeCheckError):
        fisher_trace("no module", [], {}, task="classification")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tiny_pairs_run_and_every_parameter_gets_a_gradient(architecture, task):
    if not available(architecture, task):
        with pytest.raises(ValueError, match=architecture):
            tiny_model(architecture, task)
        return
    model = tiny_model(architecture, task, dropout=0.0)
    output = model(**tiny_batch(architecture, task))
    value = output.last_hidden_state.square().sum() if task == "base" else output.loss
    value.backward()
    assert value.isfinite()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without <= {"pooler.dense.weight", "pooler.dense.bias"}


def test_tiny_models_are_the_same_for_the_same_seed_and_leave_the_generator_alone():
    state = torch.get_rng_state()
    first, second, other = (tiny_model("bert", seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert torch.equal(state, torch.get_rng_state())


def test_tiny_tokenizer():
    tokenizer = tiny_tokenizer(("hello", "world"))
    batch = tokenizer(["hello world w0", "world unheard"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[2, 5, 6, 7, 1], [2, 6, 4, 1, 0]]
    assert len(tokenizer) == 96
