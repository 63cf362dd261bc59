"""Small tokenizers of each kind that Transformers' models have, trained on a few sentences."""

from __future__ import annotations

import functools

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = ["the cat sat on the mat", "a naïve café is open", "paging and batching , they said .", "Hello world !"]
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@functools.cache
def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's, Llama 3's, Qwen's."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(inner, trainers.BpeTrainer(vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet))


@functools.cache
def stripping() -> PreTrainedTokenizerFast:
    """As Llama 2's and Mistral's: byte fallback, and a decoder that strips a leading space."""
    letters = ["▁", *sorted({letter for sentence in SENTENCES for letter in sentence if letter != " "})]
    merges = [("▁", "c"), ("▁c", "a"), ("▁ca", "t"), ("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    names = [*SPECIAL, *BYTES, *letters, *(first + second for first, second in merges)]
    vocabulary = {name: token for token, name in enumerate(names)}
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(parts)
    return wrapped(inner)


@functools.cache
def metaspace() -> PreTrainedTokenizerFast:
    """As T5's and Gemma's sentencepiece models."""
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    return trained(inner, trainers.UnigramTrainer(vocab_size=80, special_tokens=SPECIAL, unk_token="<unk>"))


@functools.cache
def word_piece() -> PreTrainedTokenizerFast:
    """As BERT's."""
    inner = Tokenizer(models.WordPiece(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    return trained(inner, trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL))


ALL = {"byte_level": byte_level, "stripping": stripping, "metaspace": metaspace, "word_piece": word_piece}


def trained(inner: Tokenizer, trainer: trainers.Trainer) -> PreTrainedTokenizerFast:
    inner.train_from_iterator(SENTENCES * 4, trainer)
    return wrapped(inner)


def wrapped(inner: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
