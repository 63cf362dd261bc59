"""The engine process: `python -m hf_paged.server.worker`, started by the front, with its orders on standard input."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import logging
import os
import pickle
import signal
import sys
import threading
from typing import Any, NoReturn

import psutil
import torch
import zmq

from hf_paged import plugins
from hf_paged.errors import HFPagedError
from hf_paged.hf.load import hide_progress, load_model, load_tokenizer, pick_device
from hf_paged.hookspecs import hookimpl
from hf_paged.llm import LLM
from hf_paged.params import SamplingParams
from hf_paged.request import Request
from hf_paged.server import logs
from hf_paged.server.config import ServerConfig
from hf_paged.server.engine_loop import EngineLoop, StepLog
from hf_paged.server.messages import Failed, Ready, encode
from hf_paged.text.defaults import end_ids, sampling_defaults

logger = logging.getLogger("hf_paged.server.worker")

PR_SET_PDEATHSIG = 1  # from linux/prctl.h
REACHES_FRONT = 30_000  # milliseconds after which a front that isn't connected won't be
LINGER = 1000  # milliseconds that the last messages have to reach the front


@dataclasses.dataclass(frozen=True)
class Orders:
    """What a front tells an engine process when it starts it.

    Attributes:
        replica: its index. replicas: how many there are on this machine.
        inbox, outbox: addresses of the sockets that it reads from and writes to. It binds them; the front connects.
        config: the server's options.
    """

    replica: int
    replicas: int
    inbox: str
    outbox: str
    config: ServerConfig


class _Observer:
    """A plugin that hands the loop's step log to the engine."""

    def __init__(self, log: StepLog) -> None:
        self._log = log

    @hookimpl
    def register_step_observers(self, register: Any) -> None:
        register(self._log)


def main() -> None:
    """Build the engine, say that it is ready, and carry requests until the front says stop or is gone.

    However it ends, the process does at once: left to itself, zmq would wait for what can't be sent.
    """
    try:
        _serve()
    except BaseException:
        logger.exception("the engine process fails")
        os._exit(1)


def _serve() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # the front decides what ends
        signal.signal(number, signal.SIG_IGN)
    try:
        orders: Orders = pickle.load(sys.stdin.buffer)
    except EOFError:  # a spare that nobody needed
        return
    _end_with_parent()
    threading.Thread(target=_die_with_front, daemon=True).start()
    logs.configure(orders.config.log_level, orders.config.log_format)
    hide_progress()  # its line is none of a log's
    context = zmq.Context()
    inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    for socket, address in ((inbox, orders.inbox), (outbox, orders.outbox)):
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.SNDTIMEO, REACHES_FRONT)
        socket.bind(address)  # fails where something has removed the front's temporary folder
    try:
        loop, ready = build(orders, inbox, outbox)
    except Exception as error:
        logger.exception("the engine can't be built")
        outbox.send(encode(Failed(f"{type(error).__name__}: {error}", usage=isinstance(error, HFPagedError))))
        _exit(context, 1)
    _wait_for_front(inbox)
    outbox.send(encode(ready))
    loop.run()
    _exit(context, 0)


def _wait_for_front(inbox: zmq.Socket[bytes]) -> None:
    """Return when the front has connected to the inbox, as its first message shows.

    Raises:
        HFPagedError: it hasn't, and won't: something has removed the socket's file before.
    """
    if not inbox.poll(REACHES_FRONT):
        raise HFPagedError(f"the front has not connected within {REACHES_FRONT / 1000:g} s")
    inbox.recv()


def _exit(context: zmq.Context[zmq.Socket[bytes]], status: int) -> NoReturn:
    """End the process once its last messages are sent, at once: destructors of GPU libraries may take seconds."""
    context.destroy(linger=LINGER)
    os._exit(status)


def _end_with_parent() -> None:
    """Have Linux kill this process when its parent ends, even while this one is stopped or in native code."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _die_with_front() -> None:
    """The front holds the other end of standard input: it ends when the front does, however that ended."""
    with contextlib.suppress(OSError):
        while sys.stdin.buffer.read(1):
            pass
    os._exit(1)


def build(orders: Orders, inbox: zmq.Socket[bytes], outbox: zmq.Socket[bytes]) -> tuple[EngineLoop, Ready]:
    """Load the model, build the engine and warm it up.

    Raises:
        HFPagedError: an option or the model is wrong; trying again is of no use.
    """
    config, log = orders.config, StepLog()
    model = _load(orders)
    paged = config.paged.replace(plugins=(*config.paged.plugins, _Observer(log)))
    if model.device.type == "cpu" and paged.num_blocks is None and paged.kv_memory is None:
        share = config.host_memory_share / orders.replicas
        paged = paged.replace(kv_memory=int(psutil.virtual_memory().available * share))
    llm = LLM(model, skip_tokenizer_init=True, config=paged, gpu_memory_utilization=config.gpu_memory_utilization)
    built, _ = llm.engine()
    engine = built.engine
    engine.warm_up()
    # A first request compiles what is compiled late; nobody should wait for that.
    engine.run([Request("warm-up", [1] * 8, SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True))])
    engine.forget()
    log.take()
    gc.collect()
    gc.freeze()  # the model's objects stay; the collector need not walk them
    loop = EngineLoop(engine, inbox, outbox, log, orders.replica, _constrainer(built.manager, config), llm)
    ready = Ready(
        pid=os.getpid(),
        model=type(model).__name__,
        max_model_len=engine.max_model_len,
        longest=min(engine.pool.longest, engine.max_model_len or engine.pool.longest),
        vocab_size=engine.model.vocab_size,
        num_logits=engine.model.num_logits,
        eos=sorted(end_ids(model.generation_config.eos_token_id)),
        max_num_seqs=paged.max_num_seqs,
        block_size=paged.block_size,
        num_blocks=engine.stats.num_blocks,
        backend=built.info.attention_backend,
        scheduler=built.info.scheduler,
        plugins=dict(plugins.loaded(built.manager)),
        structured=bool(built.manager.hook.constrain_request.get_hookimpls()),
        defaults=sampling_defaults(model.generation_config),
    )
    return loop, ready


def _load(orders: Orders) -> Any:
    config = orders.config
    device = pick_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(orders.replica % torch.cuda.device_count() if device.index is None else device)
        device = torch.device("cuda", torch.cuda.current_device())
    elif orders.replicas > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // orders.replicas))
    dummy = config.load_format == "dummy"
    return load_model(config.model, device=device, dtype=config.dtype, random=dummy, **_source(config))


def _source(config: ServerConfig) -> dict[str, Any]:
    return {"revision": config.revision, "trust_remote_code": config.trust_remote_code}


def _constrainer(manager: Any, config: ServerConfig) -> Any:
    """Gives a request its constraint, in a thread of the loop's. The tokenizer is loaded when the first one asks."""
    tokenizer: list[Any] = []
    lock = threading.Lock()

    def constrain(request: Request) -> None:
        with lock:
            if not tokenizer:
                tokenizer.append(load_tokenizer(config.tokenizer or config.model, **_source(config)))
        plugins.constrain(manager, request, tokenizer[0])

    return constrain


if __name__ == "__main__":
    main()
