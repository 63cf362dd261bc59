"""LLM: offline generation over prompts, under the names of vLLM's offline API, on the live Transformers model."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch

from hf_paged import plugins, vllm_names
from hf_paged.config import PagedConfig
from hf_paged.engine.admission import check_ids
from hf_paged.engine.pool import free_memory
from hf_paged.engine.thread import EngineThread
from hf_paged.errors import ConfigError, EngineClosedError, InvalidRequestError, RequestAbortedError
from hf_paged.hf.build import Built
from hf_paged.hf.handle import PatchedModel
from hf_paged.hf.llm_engine import LLMEngine, engine_view
from hf_paged.hf.load import load_model, load_tokenizer
from hf_paged.hf.memory import step_bytes
from hf_paged.hf.spec import unwrap
from hf_paged.llm_requests import Carried, Progress, carry, params_for_each, priority_for_each
from hf_paged.params import SamplingParams, is_integer
from hf_paged.request import RequestOutput
from hf_paged.stats import CacheStats
from hf_paged.text.bad_words import banned_ids
from hf_paged.text.defaults import default_params, end_ids
from hf_paged.text.messages import conversations_in
from hf_paged.text.prompts import as_list, check_text, read_prompt
from hf_paged.text.templates import render
from hf_paged.text.tokens import TokenTexts

Prompt = str | Sequence[int] | np.ndarray | torch.Tensor | Mapping[str, Any]
Message = Mapping[str, Any]


class LLM:
    """Generates for batches of prompts, batched continuously over a paged KV cache.

    Args:
        model: a Transformers model, used as it is, or the name or path of one to load.
        tokenizer: its tokenizer, or the name or path of one; None: the model's own, if it can be found.
        skip_tokenizer_init: do without; prompts are token ids then, and no text comes back.
        trust_remote_code, revision, tokenizer_revision, dtype: for loading a model or a tokenizer by name. `revision`
            is the tokenizer's too, unless it has its own. One that nothing would use is refused.
        tensor_parallel_size: only 1 for now.
        seed: of the draws of requests without a seed of their own, any integer; None: 0.
        gpu_memory_utilization: share of a GPU's memory for weights and KV pool together. On a CPU the pool grows.
        max_model_len, max_num_seqs, max_num_batched_tokens, enable_prefix_caching: as in PagedConfig.
        chat_template: used by `chat` instead of the tokenizer's own.
        enforce_eager: as in PagedConfig: no CUDA graphs.
        config: further options; those given by name here go before it.
        options: single options of PagedConfig, and vLLM's other options at values that mean what happens here anyway.

    Raises:
        UnsupportedModelError: the model can't be carried; the message says why.
        ConfigError: an option is unknown, out of range, or one of vLLM's that can't be honoured; the message says why.
    """

    def __init__(
        self,
        model: Any,
        *,
        tokenizer: Any = None,
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool | None = None,
        tensor_parallel_size: int = 1,
        dtype: Any = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        seed: int | None = 0,
        gpu_memory_utilization: float = 0.92,
        enforce_eager: bool | None = False,
        chat_template: str | None = None,
        config: PagedConfig | None = None,
        **options: Any,
    ) -> None:
        if tensor_parallel_size != 1:
            raise ConfigError(f"tensor_parallel_size={tensor_parallel_size} is not there yet; only 1 is")
        if not _is_share(gpu_memory_utilization):
            raise ConfigError(f"gpu_memory_utilization must be in (0, 1], got {gpu_memory_utilization!r}")
        if seed is not None and not is_integer(seed):
            raise ConfigError(f"seed must be an integer or None, got {seed!r:.80}")
        seed = int(seed or 0)
        config = PagedConfig.of(config, vllm_names.paged_options(options))
        if enforce_eager:
            config = config.replace(enforce_eager=True)
        if config.keep_pool is None:
            config = config.replace(keep_pool=True)
        dtype = vllm_names.DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
        loads_model = isinstance(model, str)
        name = tokenizer or (model if loads_model else unwrap(model).name_or_path)
        loads_tokenizer = not skip_tokenizer_init and isinstance(name, str) and bool(name)
        _check_loading(loads_model, loads_tokenizer, dtype, trust_remote_code, revision, tokenizer_revision)
        loading: dict[str, Any] = {"revision": revision, "trust_remote_code": bool(trust_remote_code)}
        self.model = unwrap(load_model(model, dtype=dtype, **loading) if loads_model else model)
        loading["revision"] = tokenizer_revision or revision
        self.tokenizer = None if skip_tokenizer_init else tokenizer
        if loads_tokenizer:
            self.tokenizer = load_tokenizer(name, **loading)
        self._loaded_with = {
            "seed": seed,
            "trust_remote_code": bool(trust_remote_code),
            "revision": revision,
            "tokenizer_revision": tokenizer_revision,
        }
        self.chat_template = chat_template
        self._texts: TokenTexts | None = None
        if config.num_blocks is None and config.kv_memory is None and self.model.device.type == "cuda":
            config = config.replace(kv_memory=_kv_bytes(self.model, config, gpu_memory_utilization))
        self._patched: PatchedModel | None = PatchedModel(self.model, config, seed=seed)
        try:
            self._patched.thread()  # report errors now; each call checks again, since the model may change
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------------------------------------------------ calls

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: None = None,
        priority: Sequence[int | None] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        raise_on_error: bool = False,
    ) -> list[RequestOutput]:
        """Complete prompts. Every prompt is checked before the first is begun.

        Those that may have the longest outputs are begun first: the call ends with its last request, and a long one
        that is begun late leaves the GPU to itself.

        Args:
            prompts: texts, lists or arrays of token ids, or dicts; one or many. A dict has "prompt" or
                "prompt_token_ids" (where it has both, the ids count), and may have "cache_salt", a text: only prompts
                of the same salt share the prefix cache.
            sampling_params: one for all prompts or one for each; None: what the model's generation config says.
            use_tqdm: show a progress bar; or what makes one, called with tqdm's arguments.
            priority: for each prompt, an integer or None, which is 0; the smallest runs first. Between calls each
                level is worth a minute of waiting. Refused under the scheduler "fcfs", which has no use for it, unless
                all are 0.
            lora_request, tokenization_kwargs, mm_processor_kwargs: vLLM's; only None.
            raise_on_error: raise when a prompt fails while it runs, and drop the others.

        Returns:
            The outputs, in the order of the prompts. Where one fails while it runs, the others are what they would be
            without it, and a warning says so; its own completions have the finish reason "error", and the error.

        Raises:
            UnsupportedModelError: the model was changed so that it can't be carried, or is in training mode by now.
            InvalidRequestError: a prompt is empty, too long, holds unknown ids, or is a dict with other keys; the
                message says which.
            ConfigError: the lists' lengths or entries are wrong, text is asked of an LLM without a tokenizer, or no
                plugin handles structured outputs.
            RequestFailedError: a prompt failed, under `raise_on_error`; it has the prompt's index.
            EngineClosedError, RequestAbortedError: the LLM was closed before the call, or while it ran.
        """
        vllm_names.check_call(
            lora_request=lora_request, tokenization_kwargs=tokenization_kwargs, mm_processor_kwargs=mm_processor_kwargs
        )
        scheduler = self._open().config.scheduler
        items = as_list(prompts)
        params = params_for_each(sampling_params, len(items), self.get_default_sampling_params)
        priorities = priority_for_each(priority, len(items), scheduler)

        def run(*, again: bool = False) -> list[Carried]:
            carried = self._carried(items, params, priorities)
            _, thread = self.engine()  # again: the model may have changed during the seconds that tokenising takes
            try:
                with Progress(carried, use_tqdm):
                    carry(thread, carried, raise_on_error=raise_on_error)
            except (EngineClosedError, RequestAbortedError):
                if again or not self._is_open or not thread.engine.closed:
                    raise
                return run(again=True)  # another call found the model changed, and closed its engine
            return carried

        return [one.output() for one in run()]

    def chat(
        self,
        messages: Message | Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: None = None,
        chat_template: str | None = None,
        chat_template_content_format: str | None = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        raise_on_error: bool = False,
    ) -> list[RequestOutput]:
        """Answer conversations: `generate` over what the chat template makes of them.

        Args:
            messages: one conversation, a list of them, or one message. Each message is a mapping as OpenAI has it, or
                an answer of the openai package; the server prepares them in the same way.
            chat_template: instead of the LLM's and the tokenizer's.
            chat_template_content_format: how the template takes a message's content: "string", "openai" (a list of
                parts), or "auto": found out.
            add_generation_prompt, continue_final_message, tools: as for `apply_chat_template`.
            chat_template_kwargs: further variables of the template.
            sampling_params, use_tqdm, raise_on_error: as for `generate`.
            lora_request, tokenization_kwargs, mm_processor_kwargs: vLLM's; only None.

        Raises:
            ConfigError: there is no tokenizer or no chat template, or options contradict each other.
            InvalidRequestError: the template refuses a conversation; the message says which and why.
        """
        vllm_names.check_call(
            lora_request=lora_request, tokenization_kwargs=tokenization_kwargs, mm_processor_kwargs=mm_processor_kwargs
        )
        if self.tokenizer is None:
            raise ConfigError("chat() needs a tokenizer; give LLM(tokenizer=...)")
        if add_generation_prompt and continue_final_message:
            raise ConfigError("continue_final_message=True needs add_generation_prompt=False: the last message goes on")
        encoded = []
        for index, conversation in enumerate(conversations_in(messages)):
            try:
                text = render(
                    self.tokenizer,
                    conversation,
                    tools=tools,
                    chat_template=chat_template or self.chat_template,
                    content_format=chat_template_content_format or "auto",
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    options=chat_template_kwargs,
                )
                check_text(text)
            except InvalidRequestError as error:
                raise InvalidRequestError(f"conversation {index}: {error}") from error
            # The template wrote the special tokens already.
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            encoded.append({"prompt": text, "prompt_token_ids": ids})
        return self.generate(encoded, sampling_params, use_tqdm=use_tqdm, raise_on_error=raise_on_error)

    @property
    def stats(self) -> CacheStats:
        """How the KV pool is and was used."""
        return self._open().stats

    @property
    def llm_engine(self) -> LLMEngine:
        """What programs for vLLM read of the engine, such as `llm_engine.model_config.max_model_len`."""
        return engine_view(self.model, self.tokenizer, self.engine()[1].engine, self._loaded_with)

    def get_tokenizer(self) -> Any:
        """The tokenizer, or None."""
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation config says."""
        return default_params(self.model.generation_config)

    def engine(self) -> tuple[Built, EngineThread]:
        """The engine underneath and its thread, for callers that step it themselves, as the server does."""
        return self._open().engine()

    def abort(self, caller: threading.Thread | None = None) -> int:
        """Stop the calls of all threads, or of one, which raise RequestAbortedError. Returns how many."""
        return self._open().abort(caller)

    def reset_prefix_cache(self) -> None:
        """Void the prefix cache. A change of the weights voids it too."""
        _, thread = self.engine()
        thread.post(thread.engine.forget)

    def warm_up(self) -> None:
        """Make the KV pool and capture every CUDA graph now, so that no answer waits for them."""
        _, thread = self.engine()
        thread.do(thread.engine.warm_up)

    def close(self) -> None:
        """Give the KV pool's memory back. The model stays as it is. Closing twice does nothing more."""
        if self._patched is not None:
            self._patched.remove()
            self._patched = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------------------ parts

    @property
    def _is_open(self) -> bool:
        return self._patched is not None and not self._patched.removed

    def _open(self) -> PatchedModel:
        """The patched model underneath.

        Raises:
            EngineClosedError: this is closed.
        """
        if self._patched is None or self._patched.removed:
            raise EngineClosedError("this LLM is closed; build a new one")
        return self._patched

    def _carried(
        self, items: Sequence[Any], params: Sequence[SamplingParams], priorities: Sequence[int]
    ) -> list[Carried]:
        """The requests of prompts, checked.

        Raises:
            InvalidRequestError, ConfigError: as `generate` does.
        """
        built, thread = self.engine()
        eos = end_ids(self.model.generation_config.eos_token_id, self.tokenizer)
        texts = self._token_texts()
        banned = functools.cache(lambda words: banned_ids(self.tokenizer, words))
        carried = []
        for index, (item, p, priority) in enumerate(zip(items, params, priorities, strict=True)):
            if self.tokenizer is None and (p.stop or p.bad_words):
                raise ConfigError("stop strings and bad_words need a tokenizer; give LLM(tokenizer=...)")
            try:
                prompt = read_prompt(item, self.tokenizer)
                check_ids("prompt", prompt.ids, thread.engine.model.vocab_size)  # before they are decoded
                one = Carried(prompt, p, eos, texts, priority=priority, banned=banned(p.bad_words))
                for request in one.requests:
                    plugins.constrain(built.manager, request, self.tokenizer)
                thread.engine.check_request(one.requests[0])
            except InvalidRequestError as error:
                raise InvalidRequestError(f"prompt {index}: {error}") from error
            carried.append(one)
        return carried

    def _token_texts(self) -> TokenTexts | None:
        if self.tokenizer is not None and (self._texts is None or self._texts.tokenizer is not self.tokenizer):
            self._texts = TokenTexts(self.tokenizer)
        return None if self.tokenizer is None else self._texts


def _is_share(value: object) -> bool:
    """Whether it is a number in (0, 1]."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 < value <= 1.0


def _check_loading(
    model: bool, tokenizer: bool, dtype: Any, trust_remote_code: Any, revision: Any, tokenizer_revision: Any
) -> None:
    """Refuse options for loading that nothing would use.

    Args:
        model, tokenizer: whether it is loaded by name.
        dtype, trust_remote_code, revision, tokenizer_revision: as LLM was given them.
    """
    nothing = "neither a model nor a tokenizer is loaded by name"
    instead = "tokenizer_revision goes before it" if tokenizer else nothing
    for name, value, used, why in (
        ("dtype", None if dtype == "auto" else dtype, model, "the model is loaded already"),
        ("trust_remote_code", trust_remote_code, model or tokenizer, nothing),
        ("revision", revision, model or (tokenizer and not tokenizer_revision), instead),
        ("tokenizer_revision", tokenizer_revision, tokenizer, "no tokenizer is loaded by name"),
    ):
        if value and not used:
            raise ConfigError(f"{name}={value!r} would have no effect: {why}")


def _kv_bytes(model: Any, config: PagedConfig, share: float) -> int:
    """What is left of a GPU's share for keys and values, with room for a step's activations and for CUDA graphs."""
    device = model.device
    free, total = free_memory(device), torch.cuda.mem_get_info(device)[1]
    budget = int(free - (1.0 - share) * total) - step_bytes(model, config)
    if budget <= 0:
        raise ConfigError(
            f"gpu_memory_utilization={share} leaves no room for the KV pool: "
            f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB are free, and a step takes "
            f"{step_bytes(model, config) / 2**30:.1f} GiB; raise it, or lower max_num_batched_tokens"
        )
    return budget
