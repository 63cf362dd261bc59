"""What the front and an engine process say to each other: msgspec structs, packed as msgpack.

Both ends are of one release and one machine, so structs are packed as arrays, without field names: only append fields.
Times are seconds; points in time are `time.monotonic()`, which all processes of a machine share.
"""

from __future__ import annotations

from typing import Any

import msgspec

# ------------------------------------------------------------------------------------------------------ to the engine


class Add(msgspec.Struct, array_like=True, tag="add"):
    """Take a request, from its beginning or from its next token.

    Attributes:
        id: unique in this engine process.
        prompt: token ids.
        params: the fields of SamplingParams that differ from its defaults; `n` is 1.
        output: tokens that it has already; they count as output.
        eos: ids that end it.
        banned: token sequences that must not be produced.
        cache_key: only requests of the same key share blocks (vLLM's cache_salt).
        parent: id of an earlier request with the same prompt, or None.
        arrival: when its call came; None: now.
    """

    id: str
    prompt: list[int]
    params: dict[str, Any]
    output: list[int] = []
    eos: list[int] = []
    banned: list[list[int]] = []
    priority: int = 0
    cache_key: str | None = None
    parent: str | None = None
    arrival: float | None = None


class Abort(msgspec.Struct, array_like=True, tag="abort"):
    """Drop requests; nothing more is said about them."""

    ids: list[str]


class WatchBlocks(msgspec.Struct, array_like=True, tag="watch"):
    """Send the block map with the statistics for this many seconds."""

    seconds: float


class Hello(msgspec.Struct, array_like=True, tag="hello"):
    """The first message: the front is connected."""


class Stop(msgspec.Struct, array_like=True, tag="stop"):
    """Close the engine and end the process."""


# ---------------------------------------------------------------------------------------------------- from the engine


class Ready(msgspec.Struct, array_like=True, tag="ready"):
    """The model is loaded, and the engine takes requests.

    Attributes:
        pid: of the engine process.
        model: its class.
        max_model_len: most tokens of a request, prompt and output, or None: no limit of the model's.
        longest: most tokens of a request that the KV pool can hold.
        vocab_size, num_logits: token ids that it reads and writes lie below these.
        eos: ids that end an output.
        max_num_seqs: most requests of a step.
        block_size, num_blocks: of the KV pool; blocks may grow on a CPU.
        backend, scheduler, plugins: what it is made of.
        structured: whether a plugin handles structured outputs.
        defaults: fields of SamplingParams that the model's generation config sets.
    """

    pid: int
    model: str
    max_model_len: int | None
    longest: int
    vocab_size: int
    num_logits: int
    eos: list[int]
    max_num_seqs: int
    block_size: int
    num_blocks: int
    backend: str
    scheduler: str
    plugins: dict[str, str]
    structured: bool
    defaults: dict[str, Any]


class TokenLogprobs(msgspec.Struct, array_like=True):
    """Log-probabilities at one position: parallel lists; the first entry is the token's own."""

    ids: list[int]
    logprobs: list[float]
    ranks: list[int]


class Delta(msgspec.Struct, array_like=True):
    """What one or more steps brought for a request.

    Attributes:
        tokens: new token ids.
        logprobs: for each new token, where asked for.
        prompt_logprobs: once, with the first token, where asked for; None for the first prompt token.
        cached: prompt tokens that the prefix cache gave; once, with the first token.
        finish: stop, length, abort, error or refused at the end; else None. refused: turned away before it ran.
        stop_reason: the stop token's id, if one ended it.
        error: what went wrong, if `finish` is error or refused. error_kind: invalid, rejected or internal.
        retry_after: seconds, where a plugin rejected it, or it waited too long in the front.
        queued, prefill, decode: seconds, at the end: until first scheduled, to the first token, to the last.
        preemptions: at the end, how often it lost its blocks.
    """

    id: str
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    cached: int | None = None
    finish: str | None = None
    stop_reason: int | None = None
    error: str | None = None
    error_kind: str | None = None
    retry_after: float | None = None
    queued: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    preemptions: int = 0


class Deltas(msgspec.Struct, array_like=True, tag="deltas"):
    """What a step brought."""

    deltas: list[Delta]


class StepRecord(msgspec.Struct, array_like=True):
    """One step: its tokens, and how long it took."""

    prefill_tokens: int
    decode_tokens: int
    seconds: float


class BlockGroup(msgspec.Struct, array_like=True):
    """The blocks of one cache group: of the layers that see equally far back.

    Attributes:
        window: tokens that its layers see, or None: full attention.
        num_blocks, num_free: of its pool, without the null block; 0 before there is one.
        blocks: request id -> block ids, while someone watches; else None. 0 stands for what fell out of the window.
    """

    window: int | None
    num_blocks: int
    num_free: int
    blocks: dict[str, list[int]] | None = None


class EngineStats(msgspec.Struct, array_like=True, tag="stats"):
    """What an engine is doing. Counters are since the engine process began.

    Attributes:
        replica: filled in by the front.
        time: when it was sent.
        num_steps: steps done.
        busy: whether there was work. Nothing new for long while `busy`: the engine hangs.
        running, waiting: requests inside the engine, by id; the front's own queue is not counted here.
        kv_usage: share of the pool's blocks that live requests hold, 0 to 1; of the fullest group.
        num_blocks, num_free: of the pool, over all groups. block_size: tokens of a block.
        prefix_queries, prefix_hits: prompt tokens looked up in the prefix cache, and found.
        preemptions: requests that lost their blocks.
        steps: each step since the last message.
        groups: each cache group, full attention first, then windows from the largest down.
    """

    replica: int
    time: float
    num_steps: int
    busy: bool
    running: list[str]
    waiting: list[str]
    kv_usage: float
    num_blocks: int
    num_free: int
    block_size: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    steps: list[StepRecord] = []
    groups: list[BlockGroup] = []


class Failed(msgspec.Struct, array_like=True, tag="failed"):
    """The engine could not be built; the process ends. `usage`: trying again is of no use, an option is wrong."""

    message: str
    usage: bool = False


ToEngine = Hello | Add | Abort | WatchBlocks | Stop
FromEngine = Ready | Deltas | EngineStats | Failed

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
