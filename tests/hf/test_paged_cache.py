"""PagedCache under stock forwards and stock generate(): the same answers as with stock's cache, from shared blocks."""

from __future__ import annotations

import copy
import gc
import random
import threading

import pytest
import torch
from stock import padded
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, DynamicCache, EncoderDecoderCache

import hf_paged
import zoo
from hf_paged.hf.paged_cache import PagedCache, PagedLayer

SIZE = 4  # small blocks: the prompts fill several, and the last one partly
# Grouped heads; windows beside full attention; latent attention, whose keys and values differ in size.
KINDS = ["llama", "gemma3_text", "deepseek_v3"]
# And heads that aren't grouped, windows alone, chunks, sinks, no attention interface, states beside attention.
FAMILIES = [*KINDS, "gpt2", "mistral", "llama4_text", "gpt_oss", "bloom", "qwen3_next", "falcon_h1"]
RAGGED = padded(zoo.prompts())
PATTERN = torch.tensor([zoo.prompts(lengths=[12])[0] * 3])  # repeats itself: prompt lookup finds something
OPTIONS = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}


def generate(model, inputs, cache=None, **options):
    if isinstance(inputs, torch.Tensor):
        inputs = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    given = {} if cache is None else {"past_key_values": cache}
    return model.generate(**inputs, **{**OPTIONS, **options}, **given).tolist()


def assert_same(model, inputs, **options):
    cache = PagedCache(model, block_size=SIZE)
    assert generate(model, inputs, cache, **options) == generate(model, inputs, **options)
    assert cache.get_seq_length() > 0
    check(cache)
    return cache


def check(*caches):
    """The books of caches that share memory: each block is held as often as their tables name it."""
    for key, rows in caches[0]._groups.items():
        assert rows.pages.num_free == rows.pages.pool.num_free
        rows.pages.pool.check()
        held = [0] * rows.pages.pool.num_blocks
        for cache in caches:
            for table in cache._groups[key].tables:
                for block in table:
                    held[block] += block != 0
        assert held == rows.pages.pool.refs


def step(cache, count, rows=1, heads=2, size=4, layers=None):
    """One forward's updates, with random keys and values; what the layers return."""
    states = torch.randn(2, rows, heads, count, size)
    return [cache.update(*states, layer) for layer in range(len(cache.layers) if layers is None else layers)]


def blocks(tokens, size=SIZE):
    return -(-tokens // size)


# ---------------------------------------------------------------------------------------------------- stock generate()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_over_a_padded_batch(family):
    assert_same(zoo.build(family), RAGGED)


@pytest.mark.parametrize("family", [*KINDS, "gpt2", "qwen3_next"])
def test_greedy_over_one_row(family):
    assert_same(zoo.build(family), PATTERN)


@pytest.mark.parametrize("family", [*KINDS, "mistral", "bloom", "qwen3_next"])
def test_beam_search(family):
    assert_same(zoo.build(family), RAGGED, num_beams=4, max_new_tokens=12)


@pytest.mark.parametrize("family", [*KINDS, "mistral"])
def test_prompt_lookup(family):
    """Candidates that turn out wrong are cropped, also out of windows."""
    assert_same(zoo.build(family), PATTERN, prompt_lookup_num_tokens=4)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_assisted(family):
    assert_same(zoo.build(family), PATTERN, assistant_model=zoo.build(family, seed=1))


def test_sampling_several_sequences():
    model = zoo.build("gemma3_text")
    torch.manual_seed(3)
    expected = generate(model, RAGGED, do_sample=True, num_return_sequences=3)
    torch.manual_seed(3)
    assert generate(model, RAGGED, PagedCache(model), do_sample=True, num_return_sequences=3) == expected


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"])
def test_turns_continue_on_the_cache(family):
    model, cache, stock = zoo.build(family), PagedCache(zoo.build(family).config, block_size=SIZE), DynamicCache
    talk, other = PATTERN, PATTERN
    known = stock(config=model.config)
    for turn in ([5, 6, 7], [9], [30, 31, 32, 33, 34]):
        talk = torch.tensor(generate(model, talk, cache, max_new_tokens=7))
        other = torch.tensor(generate(model, other, known, max_new_tokens=7))
        assert talk.tolist() == other.tolist()
        assert cache.get_seq_length() == known.get_seq_length() == talk.shape[1] - 1
        talk = other = torch.cat([talk, torch.tensor([turn])], 1)


def test_an_encoder_decoder_takes_it_for_its_decoder():
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "vocab_size": 64}
    torch.manual_seed(0)
    config = BartConfig(**sizes, decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, init_std=0.5)
    model = BartForConditionalGeneration(config).eval()
    inputs = torch.randint(4, 60, (2, 9))
    for beams in (1, 3):
        cache = EncoderDecoderCache(PagedCache(model, block_size=SIZE), DynamicCache())
        assert generate(model, inputs, cache, num_beams=beams) == generate(model, inputs, num_beams=beams)
        assert cache.self_attention_cache.num_used_blocks > 0


# ---------------------------------------------------------------------------------------------------- as stock's layers


def test_it_is_exported():
    assert hf_paged.PagedCache is PagedCache


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v3", "mistral"])
def test_a_forward_over_it_has_stocks_logits(family):
    model = zoo.build(family)
    ours, stock = PagedCache(model, block_size=SIZE), DynamicCache(config=model.config)
    with torch.no_grad():
        for count in (11, 1, 1, 9, 1, 17, 1):  # prefill, decode and chunks, over the windows' edges
            ids = torch.randint(3, zoo.VOCAB, (2, count))
            got, expected = model(ids, past_key_values=ours).logits, model(ids, past_key_values=stock).logits
            torch.testing.assert_close(got, expected)
    assert ours.is_sliding == stock.is_sliding
    for mine, theirs in zip(ours, stock, strict=True):  # a dynamic cache is iterated over
        torch.testing.assert_close(mine[:2], theirs[:2])


@pytest.mark.parametrize("seed", range(6))
def test_any_sequence_of_operations_shows_what_stock_shows(seed):
    """Updates, reorders, repeats, selections and crops, on windows and full attention, against DynamicCache."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    config = zoo.tiny_config("gemma3_text")
    ours, stock = PagedCache(config, block_size=draw.choice([1, 2, 4, 16])), DynamicCache(config=config)
    ours.activate_past_recording()
    stock.activate_past_recording()
    rows = draw.randint(1, 3)

    def same(got, expected):
        assert torch.equal(got, expected)

    for _ in range(120):
        count = draw.choice([1, 1, 1, 2, 3, 12])
        assert ours.get_seq_length() == stock.get_seq_length()
        for layer in range(len(stock.layers)):
            assert ours.get_mask_sizes(count, layer) == stock.get_mask_sizes(count, layer)
            states = torch.randn(rows, 2, count, 4), torch.randn(rows, 2, count, 6)
            for got, expected in zip(ours.update(*states, layer), stock.update(*states, layer), strict=True):
                same(got, expected)
        crop = -draw.randint(0, min(count, ours.get_seq_length() - 1))
        ours.crop(crop)
        stock.crop(crop)
        action = draw.randrange(6)
        if action == 0:
            beams = torch.tensor([draw.randrange(rows) for _ in range(rows)])
            ours.reorder_cache(beams)
            stock.reorder_cache(beams)
        elif action == 1 and rows < 4:
            ours.batch_repeat_interleave(2)
            stock.batch_repeat_interleave(2)
            rows *= 2
        elif action == 2 and rows > 2:
            kept = torch.tensor([True] + [draw.random() < 0.5 for _ in range(rows - 1)])
            kept = draw.choice([kept, kept.nonzero().flatten()])
            ours.batch_select_indices(kept)
            stock.batch_select_indices(kept)
            rows = int(kept.sum()) if kept.dtype == torch.bool else len(kept)
        check(ours)
        if stock.get_seq_length():
            for mine, theirs in zip(ours.layers, stock.layers, strict=True):
                same(mine.keys, theirs.keys)
                same(mine.values, theirs.values)


def test_maximum_lengths_are_stocks():
    config = zoo.tiny_config("gemma3_text")
    ours, stock = PagedCache(config), DynamicCache(config=config)
    assert [ours.get_max_length(i) for i in (0, 1)] == [stock.get_max_length(i) for i in (0, 1)] == [zoo.WINDOW, -1]
    assert ours.get_max_length() == stock.get_max_length()
    assert not ours.is_compileable
    assert ours.is_croppable


def test_layers_that_keep_states_are_stocks():
    config = zoo.tiny_config("qwen3_next")
    ours, stock = PagedCache(config), DynamicCache(config=config)
    assert ours.is_linear == stock.is_linear
    for mine, theirs, is_linear in zip(ours.layers, stock.layers, ours.is_linear, strict=True):
        assert type(mine) is (type(theirs) if is_linear else PagedLayer)


def test_a_wrapped_model_is_unwrapped():
    wrapper = nn.Module()
    wrapper.module = zoo.build("llama")
    assert len(PagedCache(wrapper).layers) == 2


def test_the_cache_begun_in_inference_mode_goes_on_without(llama):
    cache, ids = PagedCache(llama), PATTERN[:, :9]
    with torch.inference_mode():
        llama(ids, past_key_values=cache)
    with torch.no_grad():
        got = llama(ids, past_key_values=cache).logits
        expected = llama(torch.cat([ids, ids], 1)).logits[:, 9:]
    torch.testing.assert_close(got, expected)


# ------------------------------------------------------------------------------------------------------ views, sharing


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


def test_one_row_is_read_without_a_copy():
    cache = PagedCache(zoo.tiny_config("llama"), block_size=SIZE)
    step(cache, 11)
    for _ in range(30):  # growing on the way
        for layer, (keys, values) in enumerate(step(cache, 1)):
            memory = cache.layers[layer]._memory
            assert storage(keys) == storage(memory.keys[0])
            assert storage(values) == storage(memory.values[0])


def test_beams_share_the_prompt(llama):
    prompt = torch.randint(3, zoo.VOCAB, (1, 100))
    cache = assert_same(llama, prompt, num_beams=4, max_new_tokens=8)
    assert cache.num_used_blocks <= blocks(100) + 4 * (blocks(8) + 1)


def test_repeated_rows_share_until_they_write():
    cache = PagedCache(zoo.tiny_config("llama"), block_size=SIZE)
    step(cache, 10)
    cache.batch_repeat_interleave(5)
    assert cache.num_used_blocks == 3
    step(cache, 1, rows=5)
    assert cache.num_used_blocks == 2 + 5  # the last block of the prompt was half full: each row has its own now
    check(cache)


def test_a_window_frees_what_it_left():
    cache = PagedCache(zoo.tiny_config("mistral"), block_size=SIZE)
    step(cache, 100, rows=2)
    for _ in range(50):
        step(cache, 1, rows=2)
    assert cache.num_blocks <= 2 * 2 * (blocks(zoo.WINDOW) + 1)
    check(cache)


# ------------------------------------------------------------------------------------------------------------- forks


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"])
def test_forks_diverge_and_share_the_prefix(family):
    model = zoo.build(family)
    prefix = torch.randint(3, zoo.VOCAB, (1, 150))
    trunk = PagedCache(model, block_size=SIZE)
    with torch.no_grad():
        model(prefix, past_key_values=trunk)
    before = trunk.num_used_blocks
    tails = [torch.tensor([tail]) for tail in ([5, 6, 7], [100], [9, 9, 9, 9, 9, 9])]
    forks = [trunk.fork() for _ in tails]
    assert trunk.num_used_blocks == before
    for tail, fork in zip(tails, forks, strict=True):
        branch = torch.cat([prefix, tail], 1)
        assert generate(model, branch, fork, max_new_tokens=6) == generate(model, branch, max_new_tokens=6)
    assert trunk.get_seq_length() == 150
    assert trunk.num_used_blocks < 2 * before
    check(trunk, *forks)
    branch = torch.cat([prefix, tails[0]], 1)  # and the trunk is what it was
    assert generate(model, branch, trunk) == generate(model, branch)


def test_a_deep_copy_is_a_fork(llama):
    """Transformers' recipe for using a prefix again."""
    trunk = PagedCache(llama, block_size=SIZE)
    with torch.no_grad():
        llama(PATTERN, past_key_values=trunk)
    used = trunk.num_used_blocks
    twin = copy.deepcopy(trunk)
    assert twin.num_used_blocks == used
    branch = torch.cat([PATTERN, torch.tensor([[7, 8]])], 1)
    assert generate(llama, branch, twin) == generate(llama, branch)


def test_forks_go_on_in_threads(llama):
    prefix = torch.randint(3, zoo.VOCAB, (1, 60))
    trunk = PagedCache(llama, block_size=SIZE)
    with torch.no_grad():
        llama(prefix, past_key_values=trunk)
    branches = [torch.cat([prefix, torch.tensor([[10 + i]])], 1) for i in range(6)]
    expected = [generate(llama, branch) for branch in branches]
    got = [None] * len(branches)

    def work(index):
        got[index] = generate(llama, branches[index], trunk.fork())

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(branches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == expected
    gc.collect()
    assert trunk.num_used_blocks == blocks(60)
    check(trunk)


def test_a_fork_that_is_gone_gives_its_blocks_back():
    trunk = PagedCache(zoo.tiny_config("gemma3_text"), block_size=SIZE)
    step(trunk, 20)
    used = trunk.num_used_blocks
    fork = trunk.fork()
    step(fork, 30)
    assert trunk.num_used_blocks > used
    del fork
    assert trunk.num_used_blocks == used
    check(trunk)


def test_a_fork_outlives_its_trunk():
    trunk = PagedCache(zoo.tiny_config("llama"), block_size=SIZE)
    step(trunk, 10)
    fork, keys = trunk.fork(), trunk.layers[0].keys.clone()
    trunk.reset()
    assert trunk.num_used_blocks == trunk.nbytes == 0
    step(trunk, 50, rows=3)
    assert torch.equal(fork.layers[0].keys, keys)
    assert fork.num_used_blocks == 3
    check(fork)


# ------------------------------------------------------------------------------------------------------- memory, reset


def test_memory_is_what_the_tokens_take():
    cache = PagedCache(zoo.tiny_config("llama"), block_size=16)
    assert cache.nbytes == cache.num_blocks == cache.num_used_blocks == 0
    step(cache, 100, rows=2, heads=2, size=4)
    assert cache.num_used_blocks == 2 * blocks(100, 16)
    token = 2 * 2 * 4 * 4  # keys and values, heads, size, bytes
    assert cache.nbytes == 2 * token * 16 * (cache.num_blocks + 1)  # of two layers, with the null block
    assert cache.num_blocks <= 1.5 * cache.num_used_blocks
    cache.crop(-90)
    assert cache.num_used_blocks == 2
    assert cache.get_seq_length() == 10


def test_reset_forgets_everything(llama):
    cache = PagedCache(llama)
    generate(llama, RAGGED, cache)
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == 0
    assert not cache.is_initialized
    assert generate(llama, PATTERN, cache) == generate(llama, PATTERN)  # also with another number of rows


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("wrong", [42, "llama", nn.Linear(2, 2), None])
def test_it_takes_models_and_configs(wrong):
    with pytest.raises(hf_paged.UnsupportedModelError, match=type(wrong).__name__):
        PagedCache(wrong)


def test_block_size_is_validated():
    with pytest.raises(hf_paged.ConfigError, match="block_size must be a power of two, got 12"):
        PagedCache(zoo.tiny_config("llama"), block_size=12)


def test_an_update_has_to_fit_the_first():
    cache = PagedCache(zoo.tiny_config("llama"))
    step(cache, 5, rows=2)
    with pytest.raises(ValueError, match="rows 3 instead of 2"):
        step(cache, 1, rows=3)
    with pytest.raises(ValueError, match="heads 4 instead of 2, head_dim 8 instead of 4"):
        step(cache, 1, rows=2, heads=4, size=8)
    states = torch.randn(2, 2, 1, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"dtype torch\.float64 instead of torch\.float32"):
        cache.update(states, states, 0)
    assert cache.get_seq_length() == 5


def test_crop_takes_a_negative_number():
    cache = PagedCache(zoo.tiny_config("llama"))
    step(cache, 5)
    with pytest.raises(ValueError, match="negative one, got 3"):
        cache.crop(3)


def test_a_window_that_moved_on_is_not_cropped():
    cache = PagedCache(zoo.tiny_config("gemma3_text"))
    step(cache, 20)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-2)
    assert [layer.get_seq_length() for layer in cache.layers] == [20, 20]


def test_layers_of_a_window_advance_together():
    cache = PagedCache(zoo.tiny_config("mistral"), block_size=SIZE)
    step(cache, 4)
    for _ in range(30):
        step(cache, 1, layers=1)
    with pytest.raises(RuntimeError, match="advance together"):
        step(cache, 1)


def test_gradients_stop_with_an_error(llama):
    """What was cached has no history: better none than a wrong gradient."""
    ours, stock = PagedCache(llama), DynamicCache(config=llama.config)
    grads = []
    for cache in (ours, stock):
        llama(PATTERN, past_key_values=cache).logits.square().mean().backward()  # of the prompt alone they are right
        grads.append([p.grad.clone() for p in llama.parameters()])
        llama.zero_grad()
    torch.testing.assert_close(*grads)
    logits = llama(PATTERN[:, :2], past_key_values=ours).logits
    with pytest.raises(RuntimeError, match="PagedCache keeps no gradients"):
        logits.mean().backward()
