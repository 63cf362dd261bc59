"""generate()'s arguments: each gives stock's result on the engine, or falls back to stock with a reason."""

from __future__ import annotations

import time
import warnings
from typing import Any

import pytest
import torch
from stock import assert_same, both, caught, free, fresh, padded, same_tensor, sequences
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BatchEncoding,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    TextStreamer,
    TopKLogitsWarper,
    WatermarkingConfig,
)
from transformers.generation import EosTokenCriteria

import hf_paged
import zoo

ROWS = zoo.prompts(1, (5, 12, 1, 9))
LONG = {"max_new_tokens": 12}
MANY_ENDS = list(range(20, 60))  # a random model meets one of them every few tokens


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return zoo.build("llama")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """256 tokens: three special ones, then bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:253]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


# -------------------------------------------------------------------------------------------------- choosing the tokens

WARPERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.8, "top_k": 20},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"top_h": 0.5},
    {"typical_p": 0.7},
    {"epsilon_cutoff": 0.01},
    {"eta_cutoff": 0.01},
    {"top_k": 50, "top_p": 0.9, "temperature": 0.9, "renormalize_logits": True},
]
PROCESSORS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 1.3, "eos_token_id": MANY_ENDS, "top_k": 30},  # its processor may know each row's padding
    {"no_repeat_ngram_size": 2},
    {"encoder_repetition_penalty": 1.3},
    {"encoder_no_repeat_ngram_size": 1},
    {"bad_words_ids": [[7], [100, 101], [30]]},
    {"sequence_bias": {(9,): 5.0, (9, 10): -8.0}},
    {"min_length": 20, "eos_token_id": MANY_ENDS},
    {"min_new_tokens": 6, "eos_token_id": MANY_ENDS},
    {"forced_bos_token_id": 17},
    {"forced_eos_token_id": 33},
    {"suppress_tokens": list(range(100, 200))},
    {"begin_suppress_tokens": list(range(100, 256))},
    {"exponential_decay_length_penalty": (3, 1.5), "eos_token_id": [5, 6]},
    {"remove_invalid_values": True},
    {"guidance_scale": 1.5},
    {"watermarking_config": WatermarkingConfig(bias=4.0)},
]


def _id(kwargs: dict[str, Any]) -> str:
    return "-".join(kwargs) or "plain"


@pytest.mark.parametrize("kwargs", WARPERS, ids=_id)
def test_sampling(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    assert_same(model, **padded(ROWS), **LONG, do_sample=True, eos_token_id=[5, 6, 7, 8, 9], **kwargs)


@pytest.mark.parametrize("kwargs", PROCESSORS, ids=_id)
@pytest.mark.parametrize("do_sample", [False, True])
def test_processors(model: PreTrainedModel, kwargs: dict[str, Any], do_sample: bool) -> None:
    if "guidance_scale" in kwargs:
        rows = zoo.prompts(1, (9,))  # stock's own processor knows no padding
        assert_same(model, **padded(rows), **LONG, do_sample=do_sample, **kwargs)
    else:
        assert_same(model, **padded(ROWS), **LONG, do_sample=do_sample, **kwargs)


def test_processors_change_something(model: PreTrainedModel) -> None:
    """Or the tests above would pass with any that is dropped."""
    plain = model.generate(**padded(ROWS), **LONG, do_sample=False).tolist()
    dull = [kwargs for kwargs in PROCESSORS if not {"remove_invalid_values", "guidance_scale"} & set(kwargs)]
    same = [
        kwargs for kwargs in dull if model.generate(**padded(ROWS), **LONG, do_sample=False, **kwargs).tolist() == plain
    ]
    assert len(same) <= 2, same


def test_synthid_watermark(model: PreTrainedModel) -> None:
    config = SynthIDTextWatermarkingConfig(keys=[654, 400, 836], ngram_len=3)
    assert_same(model, **padded(ROWS), **LONG, do_sample=True, watermarking_config=config)


class Shift(LogitsProcessor):
    """Looks at the whole batch: what a row gets depends on the others."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, int(input_ids.sum()) % 200 + 3] += 3.0
        return scores


def test_custom_processor(model: PreTrainedModel) -> None:
    for do_sample in (False, True):
        assert_same(model, **padded(ROWS), **LONG, do_sample=do_sample, logits_processor=[Shift()])
        assert_same(
            model, **padded(ROWS), **LONG, do_sample=do_sample, top_k=9, logits_processor=LogitsProcessorList([Shift()])
        )


def test_custom_instance_of_a_known_processor_goes_first(model: PreTrainedModel) -> None:
    assert_same(model, **padded(ROWS), **LONG, do_sample=True, top_k=50, logits_processor=[TopKLogitsWarper(2)])


def test_prefix_allowed_tokens_fn(model: PreTrainedModel) -> None:
    got, _ = assert_same(
        model,
        **padded(ROWS),
        **LONG,
        do_sample=True,
        prefix_allowed_tokens_fn=lambda row, ids: [3 + row, 10 + row, 20 + len(ids)],
    )
    assert set(got[1, 12:].tolist()) <= {4, 11, *range(30, 60)}


def test_nothing_left_to_draw_raises_as_in_stock(model: PreTrainedModel) -> None:
    kwargs: dict[str, Any] = dict(**LONG, do_sample=True, suppress_tokens=list(range(256)))
    with pytest.raises(RuntimeError, match="inf.*nan"):
        model.generate(**padded(ROWS), **kwargs)
    handle = hf_paged.patch(model)
    with pytest.raises(RuntimeError, match="inf.*nan"):
        model.generate(**padded(ROWS), **kwargs)
    assert free(handle.stats)


# ------------------------------------------------------------------------------------------------------ knowing the end


@pytest.mark.parametrize("do_sample", [False, True])
def test_eos_list(model: PreTrainedModel, do_sample: bool) -> None:
    got, _ = assert_same(model, **padded(ROWS), max_new_tokens=30, do_sample=do_sample, eos_token_id=MANY_ENDS)
    assert got.shape[1] < 12 + 30  # every row ended before
    assert (got[:, -1] == zoo.PAD).any()


def test_no_eos_at_all(model: PreTrainedModel) -> None:
    config = GenerationConfig(max_new_tokens=12, do_sample=True, pad_token_id=zoo.PAD)
    own = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = None
    try:
        got, _ = assert_same(model, **padded(ROWS), generation_config=config)
        assert got.shape[1] == 24
        assert_same(model, **padded(ROWS), generation_config=config, stopping_criteria=[EveryFew(3)])
    finally:
        model.generation_config.eos_token_id = own


def test_pad_is_eos(model: PreTrainedModel) -> None:
    assert_same(
        model, **padded(ROWS), max_new_tokens=20, do_sample=True, eos_token_id=MANY_ENDS, pad_token_id=MANY_ENDS[0]
    )


class EveryFew(StoppingCriteria):
    def __init__(self, divisor: int) -> None:
        self.divisor = divisor

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] % self.divisor == 0


class Together(StoppingCriteria):
    """Ends all rows at once, by a count over the batch."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), int(input_ids.sum()) % 5 == 0)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("criterion", [EveryFew(5), Together()], ids=["row", "batch"])
def test_custom_criteria(model: PreTrainedModel, criterion: StoppingCriteria, do_sample: bool) -> None:
    assert_same(model, **padded(ROWS), **LONG, do_sample=do_sample, stopping_criteria=[criterion])
    assert_same(model, **padded(ROWS), **LONG, do_sample=do_sample, stopping_criteria=StoppingCriteriaList([criterion]))


def test_known_criteria_of_the_callers_own(model: PreTrainedModel) -> None:
    """They go before those of the config."""
    got, _ = assert_same(
        model, **padded(ROWS), max_new_tokens=30, do_sample=False, stopping_criteria=[EosTokenCriteria(MANY_ENDS)]
    )
    assert got.shape[1] < 42
    got, _ = assert_same(
        model,
        **padded(ROWS),
        max_new_tokens=30,
        do_sample=False,
        eos_token_id=MANY_ENDS,
        stopping_criteria=[EosTokenCriteria(255)],
    )
    assert got.shape[1] == 42
    got, _ = assert_same(
        model, **padded(ROWS), max_new_tokens=30, do_sample=False, stopping_criteria=[MaxLengthCriteria(20)]
    )
    assert got.shape[1] == 20
    two = [MaxLengthCriteria(22), MaxLengthCriteria(17)]
    got, _ = assert_same(model, **padded(ROWS), max_new_tokens=30, do_sample=False, stopping_criteria=two)
    assert got.shape[1] == 17


def test_max_time(model: PreTrainedModel) -> None:
    hf_paged.patch(model, on_unsupported="error")
    model.generate(**padded(ROWS), max_new_tokens=2)
    began = time.monotonic()
    output = model.generate(**padded(ROWS), max_new_tokens=450, min_new_tokens=450, do_sample=False, max_time=0.2)
    assert time.monotonic() - began >= 0.2
    assert 12 < output.shape[1] < 462  # it ends long before its length
    assert model.generate(**padded(ROWS), max_new_tokens=9, max_time=1e-9).shape[1] == 13


@pytest.mark.parametrize("do_sample", [False, True])
def test_stop_strings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, do_sample: bool) -> None:
    kwargs: dict[str, Any] = dict(max_new_tokens=30, do_sample=do_sample, tokenizer=tokenizer)
    stops = [tokenizer.decode([i]) for i in range(30, 60)]
    got, _ = assert_same(model, **padded(ROWS), **kwargs, stop_strings=stops)
    assert got.shape[1] < 42
    assert_same(model, **padded(ROWS), **kwargs, stop_strings=stops[0])
    config = GenerationConfig(max_new_tokens=30, do_sample=do_sample, stop_strings=stops)
    in_config, _ = assert_same(model, **padded(ROWS), generation_config=config, tokenizer=tokenizer)
    assert in_config.tolist() == got.tolist()
    assert config.stop_strings == stops
    with pytest.raises(ValueError, match="tokenizer"):
        both(model, **padded(ROWS), max_new_tokens=3, stop_strings=stops)


def test_lengths(model: PreTrainedModel) -> None:
    batch = padded(ROWS)
    assert assert_same(model, **batch, do_sample=False)[0].shape[1] == 32  # stock's default: 20 new tokens
    assert_same(model, **batch, do_sample=False, max_length=19)
    assert_same(model, **batch, do_sample=False, max_length=19, max_new_tokens=3)
    assert assert_same(model, **batch, do_sample=False, max_new_tokens=1)[0].shape[1] == 13
    for wrong in ({"max_new_tokens": 0}, {"max_length": 5}, {"max_new_tokens": -1}):
        outcomes = []
        for patched in (False, True):
            if patched:
                hf_paged.patch(model)
            try:
                outcomes.append(model.generate(**batch, do_sample=False, **wrong).tolist())
            except ValueError as error:
                outcomes.append(str(error))
        hf_paged.unpatch(model)
        assert outcomes[0] == outcomes[1]


def test_config_object_and_keywords(model: PreTrainedModel) -> None:
    config = GenerationConfig(max_new_tokens=9, do_sample=True, top_k=5, eos_token_id=MANY_ENDS, pad_token_id=zoo.PAD)
    before = config.to_dict()
    assert_same(model, **padded(ROWS), generation_config=config)
    assert_same(model, **padded(ROWS), generation_config=config, top_k=2, max_new_tokens=14)
    assert config.to_dict() == before
    own = model.generation_config.to_dict()
    model.generation_config.update(max_new_tokens=7, do_sample=True, temperature=1.3)
    try:
        assert assert_same(model, **padded(ROWS))[0].shape[1] <= 19
    finally:
        model.generation_config = GenerationConfig.from_dict(own)


# ---------------------------------------------------------------------------------------------------- what goes in


def test_inputs(model: PreTrainedModel) -> None:
    batch = padded(ROWS)
    kwargs: dict[str, Any] = dict(**LONG, do_sample=False)
    expected = assert_same(model, **batch, **kwargs)[0].tolist()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert assert_same(model, ids, attention_mask=mask, **kwargs)[0].tolist() == expected
    assert assert_same(model, inputs=ids, attention_mask=mask.bool(), **kwargs)[0].tolist() == expected
    assert assert_same(model, **BatchEncoding(batch), **kwargs)[0].tolist() == expected
    assert assert_same(model, ids, **kwargs)[0].tolist() == expected  # the mask is told from the padding
    config = GenerationConfig(max_new_tokens=12, do_sample=False)
    assert assert_same(model, ids, config, attention_mask=mask)[0].tolist() == expected
    same = padded(zoo.prompts(4, (6, 6, 6)))
    assert_same(model, **same, **kwargs)
    assert_same(model, same["input_ids"], **kwargs)
    assert_same(model, same["input_ids"].int(), **kwargs)


def test_one_row_and_single_tokens(model: PreTrainedModel) -> None:
    for rows in (ROWS[:1], [[9]], [[9], [10]], [[9], [10, 11, 12]]):
        assert_same(model, **padded(rows), **LONG, do_sample=True)


@pytest.mark.parametrize("do_sample", [False, True])
def test_more_rows_than_fit_a_step(model: PreTrainedModel, do_sample: bool) -> None:
    rows = zoo.prompts(5, [1 + i * 7 % 23 for i in range(64)])
    options = {"max_num_seqs": 8, "block_size": 4}
    assert_same(model, **padded(rows), max_new_tokens=10, do_sample=do_sample, eos_token_id=MANY_ENDS, options=options)
    assert_same(
        model, **padded(rows), max_new_tokens=5, do_sample=do_sample, logits_processor=[Shift()], options=options
    )


@pytest.mark.parametrize(
    "tight", [{"num_blocks": 12, "block_size": 4}, {"num_blocks": 9, "block_size": 4, "max_num_batched_tokens": 5}]
)
def test_out_of_blocks(model: PreTrainedModel, tight: dict[str, int]) -> None:
    """Rows that keep pace, and rows that don't, lose their blocks and get them back."""
    batch = padded(ROWS)
    for kwargs in (
        {},
        {"do_sample": True},
        {"logits_processor": [Shift()]},
        {"repetition_penalty": 1.2, "do_sample": True},
    ):
        expected, _ = both(model, **batch, **LONG, **kwargs)
        with hf_paged.paged(model, on_unsupported="error", **tight) as handle:
            torch.manual_seed(7)
            same_tensor(model.generate(**batch, **LONG, **kwargs), expected[0])
            assert handle.stats.num_preemptions > 0
            assert free(handle.stats)


def test_return_sequences(model: PreTrainedModel) -> None:
    kwargs: dict[str, Any] = dict(**LONG, do_sample=True, num_return_sequences=3)
    got, _ = assert_same(model, **padded(ROWS), **kwargs)
    assert len(got) == 12
    assert_same(model, **padded(ROWS), **kwargs, eos_token_id=MANY_ENDS, options={"block_size": 4, "num_blocks": 14})
    assert_same(model, **padded(ROWS), **kwargs, logits_processor=[Shift()])
    with hf_paged.paged(model, block_size=4, enable_prefix_caching=False) as handle:
        model.generate(**padded([list(range(3, 60))]), max_new_tokens=4, do_sample=True, num_return_sequences=8)
        assert handle.stats.prefix_hits == 7 * 56  # each copy takes all but the last token from the first
    with pytest.raises(ValueError, match="num_return_sequences"):
        both(model, **padded(ROWS), **LONG, do_sample=False, num_return_sequences=3)


# ------------------------------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("ends", [[2], MANY_ENDS], ids=["length", "eos"])
def test_dict_with_scores_and_logits(model: PreTrainedModel, do_sample: bool, ends: list[int]) -> None:
    kwargs: dict[str, Any] = dict(
        max_new_tokens=14, do_sample=do_sample, return_dict_in_generate=True, eos_token_id=ends
    )
    got, expected = assert_same(
        model, **padded(ROWS), **kwargs, temperature=0.8, output_scores=True, output_logits=True
    )
    for name in ("scores", "logits"):
        ours, stocks = getattr(got, name), getattr(expected, name)
        assert len(ours) == len(stocks)
        for one, other in zip(ours, stocks, strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one[:2], other[:2], rtol=1e-4, atol=1e-4)
    assert set(got) == set(expected)
    transitions = model.compute_transition_scores(got.sequences, got.scores, normalize_logits=True)
    assert transitions.shape == (4, len(got.scores))
    for partly in ({"output_scores": True}, {"output_logits": True}, {}):
        got, expected = assert_same(model, **padded(ROWS), **kwargs, **partly)
        assert set(got) == set(expected)


def test_scores_need_a_dict(model: PreTrainedModel) -> None:
    assert_same(model, **padded(ROWS), **LONG, do_sample=False, output_scores=True)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_returned_cache(family: str) -> None:
    model = zoo.build(family)
    batch = padded(ROWS)
    kwargs: dict[str, Any] = dict(**LONG, do_sample=False, return_dict_in_generate=True, eos_token_id=None)
    got, expected = assert_same(model, **batch, **kwargs)
    ours, stocks = got.past_key_values, expected.past_key_values
    assert isinstance(ours, DynamicCache)
    assert ours.get_seq_length() == stocks.get_seq_length() == 23
    for mine, other in zip(ours.layers, stocks.layers, strict=True):
        torch.testing.assert_close(mine.keys[0, :, -4:], other.keys[0, :, -4:], rtol=1e-3, atol=1e-4)
        assert mine.keys.shape == other.keys.shape
    more = torch.cat([batch["attention_mask"], torch.ones(4, 12, dtype=torch.long)], dim=-1)
    further = [
        model.generate(
            one.sequences, attention_mask=more, past_key_values=one.past_key_values, max_new_tokens=6, do_sample=False
        )
        for one in (got, expected)
    ]
    same_tensor(*further)
    assert further[0].shape[1] == 30


def test_returned_cache_is_never_of_other_weights() -> None:
    """It is computed when it is read: after a change of the weights that would be another cache than stock's."""
    model = zoo.build("llama")
    hf_paged.patch(model, on_unsupported="error")
    kwargs: dict[str, Any] = dict(**LONG, do_sample=False, return_dict_in_generate=True, eos_token_id=None)
    read, unread = (model.generate(**padded(ROWS), **kwargs).past_key_values for _ in range(2))
    assert read.get_seq_length() == 23
    keys = read.layers[0].keys.clone()
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    assert torch.equal(read.layers[0].keys, keys)
    with pytest.raises(hf_paged.UnsupportedCallError, match="weights or adapters changed"):
        unread.get_seq_length()


def test_no_cache_wanted(model: PreTrainedModel) -> None:
    got, expected = assert_same(
        model, **padded(ROWS), **LONG, do_sample=False, return_dict_in_generate=True, use_cache=False
    )
    assert got.past_key_values is None
    assert expected.past_key_values is None


class Recorder:
    """A streamer that writes down what it is given."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        assert value.device.type == "cpu"
        self.seen.append((value.dtype, value.tolist()))

    def end(self) -> None:
        self.seen.append("end")


@pytest.mark.parametrize(
    "kwargs", [{}, {"do_sample": True}, {"eos_token_id": MANY_ENDS}, {"stopping_criteria": [EveryFew(5)]}], ids=_id
)
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS], ids=["row", "batch"])
def test_streamer(model: PreTrainedModel, rows: list[list[int]], kwargs: dict[str, Any]) -> None:
    streamers: list[Recorder] = []

    def make() -> Recorder:
        streamers.append(Recorder())
        return streamers[-1]

    assert_same(model, **padded(rows), **LONG, **kwargs, streamer=fresh(make))
    assert streamers[0].seen == streamers[1].seen
    assert len(streamers[0].seen) >= 3


def test_text_streamer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = []
    both(
        model,
        **padded(ROWS[:1]),
        **LONG,
        do_sample=False,
        streamer=fresh(lambda: TextStreamer(tokenizer, skip_prompt=True)),
    )
    outputs = capsys.readouterr().out
    half = len(outputs) // 2
    assert outputs[:half] == outputs[half:] != ""
    for _ in range(2):
        with pytest.raises(ValueError, match="batch size 1"):
            model.generate(**padded(ROWS), **LONG, streamer=TextStreamer(tokenizer))
        hf_paged.patch(model)


def test_streamer_and_criterion_take_turns_as_in_stock(model: PreTrainedModel) -> None:
    """A criterion that asks the streamer for what it has seen ends the call at stock's step."""

    class Counter(Recorder, StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), len(self.seen) >= 5)

    shapes = []
    for patched in (False, True):
        if patched:
            hf_paged.patch(model, on_unsupported="error")
        counter = Counter()
        shapes.append(
            model.generate(**padded(ROWS), **LONG, do_sample=False, streamer=counter, stopping_criteria=[counter]).shape
        )
    assert shapes[0] == shapes[1]


def test_generate_inside_a_callback(model: PreTrainedModel) -> None:
    class Ask(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            inner = model.generate(input_ids[:1], max_new_tokens=2, do_sample=False)
            scores[:, inner[0, -1]] += 10
            return scores

    assert_same(model, **padded(zoo.prompts(1, (6, 6))), max_new_tokens=4, do_sample=False, logits_processor=[Ask()])


# --------------------------------------------------------------------------------------------------- modes of the model


def test_grad_and_inference_mode(model: PreTrainedModel) -> None:
    got, expected = assert_same(model, **padded(ROWS), **LONG, do_sample=True)
    assert not got.requires_grad
    with torch.inference_mode():
        got, expected = assert_same(model, **padded(ROWS), **LONG, do_sample=True)
    assert got.is_inference() == expected.is_inference()
    hf_paged.patch(model, on_unsupported="error")
    with hf_paged.paged(model), torch.inference_mode():
        first = model.generate(**padded(ROWS), **LONG, do_sample=False)
    same_tensor(model.generate(**padded(ROWS), **LONG, do_sample=False), torch.tensor(first.tolist()))
    assert torch.is_grad_enabled()
    loss = model(**padded(ROWS[:1]), labels=torch.tensor(ROWS[:1])).loss
    loss.backward()  # nothing that the model keeps is an inference tensor
    model.zero_grad()


def test_half_precision(model: PreTrainedModel) -> None:
    half = zoo.build("llama").to(torch.bfloat16)
    batch = padded(ROWS)
    kwargs: dict[str, Any] = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)
    (expected, _), (got, _) = both(half, **batch, **kwargs)
    assert got.sequences.dtype == expected.sequences.dtype
    assert got.logits[0].dtype == expected.logits[0].dtype == torch.float32
    error = (got.logits[0] - expected.logits[0]).norm() / expected.logits[0].norm()
    assert error < 0.03
    assert (got.sequences[:, 12] == expected.sequences[:, 12]).sum() >= 3


def test_dtype_changes_between_calls() -> None:
    model = zoo.build("llama")
    batch = padded(ROWS)
    with hf_paged.paged(model, on_unsupported="error"):
        first = model.generate(**batch, **LONG, do_sample=False)
        model.to(torch.bfloat16)
        model.generate(**batch, **LONG, do_sample=False)
        model.to(torch.float64)
        model.load_state_dict(zoo.build("llama").state_dict())
        same_tensor(model.generate(**batch, **LONG, do_sample=False), first)


def test_autocast(model: PreTrainedModel) -> None:
    kwargs: dict[str, Any] = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (expected, _), (got, _) = both(model, **padded(ROWS), **kwargs)
    assert (got.logits[0] - expected.logits[0]).norm() / expected.logits[0].norm() < 0.03
    with hf_paged.paged(model, on_unsupported="error"):
        plain = model.generate(**padded(ROWS), **kwargs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model.generate(**padded(ROWS), **kwargs)
        again = model.generate(**padded(ROWS), **kwargs)
    assert torch.equal(plain.logits[0], again.logits[0])  # not from keys of half precision
    assert not torch.equal(plain.logits[0], half.logits[0])


def test_training_mode_without_dropout() -> None:
    model = zoo.build("llama").train()
    assert_same(model, **padded(ROWS), **LONG, do_sample=True)
    assert model.training
    model.gradient_checkpointing_enable()
    assert_same(model, **padded(ROWS), **LONG, do_sample=False, use_cache=False)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_training_mode_with_dropout_is_stocks(family: str) -> None:
    """Dropout in modules, in the config alone (attention's), as a function: the noise has to be there."""
    model = zoo.build(family)
    if family == "llama":
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.3
        model.config.attention_dropout = 0.3
    plain = model.generate(**padded(ROWS), **LONG, do_sample=False)
    model.train()
    torch.manual_seed(0)
    expected = model.generate(**padded(ROWS), **LONG, do_sample=False), torch.rand(1)
    handle = hf_paged.patch(model)
    with caught() as warned:
        torch.manual_seed(0)
        same_tensor(model.generate(**padded(ROWS), **LONG, do_sample=False), expected[0])
    assert torch.equal(torch.rand(1), expected[1])
    assert len(warned) == 1
    assert "dropout" in warned[0]
    assert hf_paged.explain(model).path == "stock"
    assert handle.stats.reserved_tokens == 0
    model.eval()  # and the patched model takes it up
    same_tensor(model.generate(**padded(ROWS), **LONG, do_sample=False), plain)
    assert handle.stats.reserved_tokens > 0


# --------------------------------------------------------------------------------------------------------- falling back


def _cache(model: PreTrainedModel) -> Any:
    return DynamicCache(config=model.config)


IDS = torch.tensor(zoo.prompts(1, (7,)))
FALLBACKS: dict[str, Any] = {
    "beam search": lambda m: {"num_beams": 2},
    "beam sample": lambda m: {"num_beams": 2, "do_sample": True},
    "assisted": lambda m: {"assistant_model": zoo.build("llama", seed=1)},
    "assisted generation": lambda m: {"prompt_lookup_num_tokens": 2},
    "output_attentions": lambda m: {"output_attentions": True, "return_dict_in_generate": True},
    "output_hidden_states": lambda m: {"output_hidden_states": True, "return_dict_in_generate": True},
    "past_key_values": lambda m: {"past_key_values": _cache(m)},
    "inputs_embeds": lambda m: {"inputs_embeds": m.get_input_embeddings()(IDS), "input_ids": None},
    "position_ids": lambda m: {"position_ids": torch.arange(7)[None]},
    "custom_generate": lambda m: {"custom_generate": lambda model, input_ids, **kwargs: input_ids},
    "classifier-free guidance": lambda m: {"negative_prompt_ids": IDS, "guidance_scale": 1.5},
    "BOS": lambda m: {"input_ids": None},
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_falls_back(model: PreTrainedModel, reason: str) -> None:
    def call() -> Any:
        torch.manual_seed(0)
        return model.generate(**{"input_ids": IDS, "max_new_tokens": 5, **FALLBACKS[reason](model)})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = call()
        hf_paged.patch(model)
        with caught() as warned:
            same_tensor(sequences(call()), sequences(expected))
            call()
        assert len(warned) == 1
        assert reason.lower() in warned[0].lower()
        hf_paged.unpatch(model)
        hf_paged.patch(model, on_unsupported="silent")
        with caught() as warned:
            call()
        assert not warned
        hf_paged.unpatch(model)
        hf_paged.patch(model, on_unsupported="error")
        with pytest.raises(hf_paged.UnsupportedCallError, match=f"(?i){reason}"):
            call()


@pytest.mark.parametrize("cache", ["quantized", "offloaded", "offloaded_static", "paged"])
def test_other_caches_fall_back(model: PreTrainedModel, cache: str) -> None:
    hf_paged.patch(model, on_unsupported="error")
    with pytest.raises(hf_paged.UnsupportedCallError, match=cache):
        model.generate(IDS, cache_implementation=cache, max_new_tokens=3)
    if cache != "paged":
        with pytest.raises(hf_paged.UnsupportedCallError, match=cache):
            model.generate(IDS, generation_config=GenerationConfig(cache_implementation=cache, max_new_tokens=3))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_caches_that_hold_what_the_pool_holds(model: PreTrainedModel, cache: str) -> None:
    assert_same(model, **padded(ROWS), **LONG, do_sample=False, cache_implementation=cache, disable_compile=True)


def test_static_cache_of_the_callers_own_is_filled(model: PreTrainedModel) -> None:
    hf_paged.patch(model)
    cache = StaticCache(config=model.config, max_cache_len=32)
    with caught() as warned:
        model.generate(IDS, past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert len(warned) == 1
    assert int(cache.get_seq_length()) == 9


def test_token_healing_falls_back(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    hf_paged.patch(model, on_unsupported="error")
    with pytest.raises(hf_paged.UnsupportedCallError, match="token_healing"):
        model.generate(IDS, token_healing=True, tokenizer=tokenizer, max_new_tokens=3)


def test_masks_that_are_no_left_padding(model: PreTrainedModel) -> None:
    kwargs: dict[str, Any] = dict(max_new_tokens=5, do_sample=False)
    right = padded(ROWS, side="right")
    expected = model.generate(**right, **kwargs)
    hf_paged.patch(model)
    with caught() as warned:
        same_tensor(model.generate(**right, **kwargs), expected)
    assert len(warned) == 1
    assert "right padding" in warned[0]


def test_right_padding_has_no_answer_to_equal(model: PreTrainedModel) -> None:
    """Why it stays stock's: the answer to such a row hangs on ids that its mask hides, and on positions met twice."""
    kwargs: dict[str, Any] = dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
    answers = [model.generate(**padded(ROWS, side="right", pad=pad), **kwargs)[:, 12:].tolist() for pad in (0, 7)]
    assert answers[0][1] == answers[1][1]  # the row without padding
    assert all(answers[0][row] != answers[1][row] for row in (0, 3))
    left = [model.generate(**padded(ROWS, pad=pad), **kwargs)[:, 12:].tolist() for pad in (0, 7)]
    assert left[0] == left[1]

    positions: list[torch.Tensor] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(kwargs["position_ids"]), with_kwargs=True
    )
    model.generate(**padded(ROWS, side="right"), **kwargs)
    hook.remove()
    assert torch.cat(positions[1:], dim=-1)[3].tolist() == [1, 2, 3, 4]  # after a prompt with positions 0 to 8


def test_beyond_the_positions(model: PreTrainedModel) -> None:
    hf_paged.patch(model, on_unsupported="error")
    with pytest.raises(hf_paged.UnsupportedCallError, match="519 .*512 positions"):
        model.generate(IDS, max_new_tokens=512)


def test_keywords_that_nobody_knows_raise_as_in_stock(model: PreTrainedModel) -> None:
    messages = []
    for patched in (False, True):
        if patched:
            hf_paged.patch(model)
        with pytest.raises(ValueError, match="foo") as error:
            model.generate(IDS, foo=1, max_new_tokens=2)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_a_warning_names_the_callers_line(model: PreTrainedModel) -> None:
    hf_paged.patch(model)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model.generate(IDS, num_beams=2, max_new_tokens=3)
    assert [one.filename for one in found if "hf_paged" in str(one.message)] == [__file__]


def test_labels_of_a_trainer_are_ignored_as_in_stock(model: PreTrainedModel) -> None:
    assert_same(model, **padded(ROWS), labels=torch.zeros(4, 12, dtype=torch.long), **LONG, do_sample=False)
