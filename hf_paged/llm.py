"""LLM: offline generation over prompts, under the names of vLLM's offline API, on the live Transformers model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, cast

import torch
from tqdm import tqdm

from hf_paged import plugins
from hf_paged.config import PagedConfig
from hf_paged.engine.driver import Driver
from hf_paged.engine.pool import free_memory
from hf_paged.errors import ConfigError, EngineClosedError, InvalidRequestError
from hf_paged.hf.build import Built
from hf_paged.hf.detokenize import Detokenizer, StopStrings, banned_ids
from hf_paged.hf.handle import PatchedModel
from hf_paged.hf.load import load_model, load_tokenizer
from hf_paged.hf.memory import step_bytes
from hf_paged.hf.params import default_params, end_ids
from hf_paged.hf.spec import unwrap
from hf_paged.params import SamplingParams
from hf_paged.types import CacheStats, CompletionOutput, Logprob, Request, RequestOutput

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]
_ids = itertools.count()


class LLM:
    """Generates for batches of prompts, batched continuously over a paged KV cache.

    Args:
        model: a Transformers model, used as it is, or the name or path of one to load.
        tokenizer: its tokenizer, or the name or path of one; None: the model's own, if it can be found.
        skip_tokenizer_init: do without; prompts are token ids then, and no text comes back.
        trust_remote_code, revision, dtype: for loading a model by name.
        tensor_parallel_size: only 1 for now.
        seed: of the draws of requests without a seed of their own.
        gpu_memory_utilization: share of a GPU's memory for weights and KV pool together. On a CPU the pool grows.
        max_model_len, max_num_seqs, max_num_batched_tokens, enable_prefix_caching: as in PagedConfig.
        chat_template: used by `chat` instead of the tokenizer's own.
        enforce_eager: as in PagedConfig: no CUDA graphs.
        config: further options; those given by name here go before it.
        options: single options of PagedConfig.

    Raises:
        UnsupportedModelError: the model can't be carried; the message says why.
        ConfigError: an option is unknown or out of range.
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
        seed: int = 0,
        gpu_memory_utilization: float = 0.92,
        enforce_eager: bool = False,
        chat_template: str | None = None,
        config: PagedConfig | None = None,
        **options: Any,
    ) -> None:
        if tensor_parallel_size != 1:
            raise ConfigError(f"tensor_parallel_size={tensor_parallel_size} is not there yet; only 1 is")
        if not _is_share(gpu_memory_utilization):
            raise ConfigError(f"gpu_memory_utilization must be in (0, 1], got {gpu_memory_utilization!r}")
        config = PagedConfig.of(config, options)
        if enforce_eager:
            config = config.replace(enforce_eager=True)
        if config.keep_pool is None:
            config = config.replace(keep_pool=True)
        if not isinstance(model, str):
            wanted = None if dtype == "auto" else dtype
            _check_nothing_to_load(dtype=wanted, revision=revision, trust_remote_code=trust_remote_code)
        loading: dict[str, Any] = {"revision": revision, "trust_remote_code": bool(trust_remote_code)}
        self.model = unwrap(load_model(model, dtype=dtype, **loading) if isinstance(model, str) else model)
        name = tokenizer or self.model.name_or_path
        needs_one = not skip_tokenizer_init and isinstance(name, str) and bool(name)
        self.tokenizer = load_tokenizer(name, **loading) if needs_one else None if skip_tokenizer_init else tokenizer
        self.chat_template = chat_template
        if config.num_blocks is None and config.kv_memory is None and self.model.device.type == "cuda":
            config = config.replace(kv_memory=_kv_bytes(self.model, config, gpu_memory_utilization))
        self._patched: PatchedModel | None = PatchedModel(self.model, config, seed=seed)
        try:
            self._patched.driver()  # what is wrong is said now; each call asks again, for the model may change
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------------------------------------------------ calls

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts. Every prompt is checked before the first is begun.

        Those that may have the longest outputs are begun first: the call ends with its last request, and a long one
        that is begun late leaves the GPU to itself.

        Args:
            prompts: texts, lists of token ids, or dicts with "prompt" or "prompt_token_ids"; one or many.
            sampling_params: one for all prompts or one for each; None: what the model's generation config says.
            use_tqdm: show a progress bar.
            priority: for each prompt, under the scheduler "priority"; the smallest runs first.

        Returns:
            The outputs, in the order of the prompts.

        Raises:
            UnsupportedModelError: the model was changed so that it can't be carried, or is in training mode by now.
            InvalidRequestError: a prompt is empty, too long, or holds unknown ids; the message says which.
            ConfigError: the lists' lengths differ, text is asked of an LLM without a tokenizer, or no plugin sees to
                structured outputs.
        """
        if self._patched is None:
            raise EngineClosedError("this LLM is closed; build a new one")
        built, driver = self._patched.engine()
        items = _as_list(prompts)
        params = self._params_for(items, sampling_params)
        if priority is not None and len(priority) != len(items):
            raise ConfigError(f"priority has {len(priority)} entries for {len(items)} prompts; give one for each")
        groups = []
        for index, (item, p) in enumerate(zip(items, params, strict=True)):
            try:
                groups.append(self._requests(self._ids_of(item), p, priority[index] if priority else 0))
                for one in groups[-1]:
                    plugins.constrain(built.manager, one.request, self.tokenizer)
                driver.engine.check_request(groups[-1][0].request)
            except InvalidRequestError as error:
                raise InvalidRequestError(f"prompt {index}: {error}") from error
        with _Progress(groups, use_tqdm):
            driver.run(sorted((one.request for group in groups for one in group), key=_longest_first))
        texts = [item if isinstance(item, str) else _text_of(item) for item in items]
        return [_output(text, group, self.tokenizer) for text, group in zip(texts, groups, strict=True)]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations: `generate` over what the chat template makes of them.

        Args:
            messages: one conversation, or a list of them.
            chat_template: instead of the LLM's and the tokenizer's.
            add_generation_prompt, continue_final_message, tools, chat_template_kwargs: as for `apply_chat_template`.

        Raises:
            ConfigError: there is no tokenizer or no chat template, or options contradict each other.
        """
        if self.tokenizer is None:
            raise ConfigError("chat() needs a tokenizer; give LLM(tokenizer=...)")
        if add_generation_prompt and continue_final_message:
            raise ConfigError("continue_final_message=True needs add_generation_prompt=False: the last message goes on")
        template = chat_template or self.chat_template
        if template is None and not self.tokenizer.chat_template:
            raise ConfigError("the tokenizer has no chat template; give chat_template=...")
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [
            self.tokenizer.apply_chat_template(
                list(conversation),
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                tokenize=False,
                **(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]
        # The template wrote the special tokens already.
        encoded = [
            {"prompt": text, "prompt_token_ids": self.tokenizer.encode(text, add_special_tokens=False)}
            for text in prompts
        ]
        return self.generate(encoded, sampling_params, use_tqdm=use_tqdm)

    @property
    def stats(self) -> CacheStats:
        """How the KV pool is and was used."""
        if self._patched is None:
            raise EngineClosedError("this LLM is closed")
        return self._patched.stats

    def get_tokenizer(self) -> Any:
        """The tokenizer, or None."""
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation config says."""
        return default_params(self.model)

    def engine(self) -> tuple[Built, Driver]:
        """The engine underneath and its driver, for who steps it himself, as the server does."""
        if self._patched is None:
            raise EngineClosedError("this LLM is closed; build a new one")
        return self._patched.engine()

    def reset_prefix_cache(self) -> None:
        """Void the prefix cache; a change of the weights does so by itself."""
        if self._patched is None:
            raise EngineClosedError("this LLM is closed; build a new one")
        driver = self._patched.driver()
        driver.post(driver.engine.forget)

    def warm_up(self) -> None:
        """Make the KV pool and capture every CUDA graph now, so that no answer waits for them."""
        if self._patched is None:
            raise EngineClosedError("this LLM is closed; build a new one")
        driver = self._patched.driver()
        driver.do(driver.engine.warm_up)

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

    def _params_for(
        self, items: Sequence[Prompt], given: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        if given is None:
            given = default_params(self.model)
        each = [given] * len(items) if isinstance(given, SamplingParams) else list(given)
        if len(each) != len(items):
            raise ConfigError(
                f"sampling_params has {len(each)} entries for {len(items)} prompts; give one, or one for each"
            )
        for params in each:
            if self.tokenizer is None and (params.stop or params.bad_words):
                raise ConfigError("stop strings and bad_words need a tokenizer; give LLM(tokenizer=...)")
        return each

    def _ids_of(self, item: Prompt) -> list[int]:
        if isinstance(item, Mapping):
            if not item.keys() & {"prompt", "prompt_token_ids"}:
                raise InvalidRequestError(f"a prompt dict needs 'prompt' or 'prompt_token_ids'; it has {sorted(item)}")
            return self._ids_of(item["prompt_token_ids"] if "prompt_token_ids" in item else item["prompt"])
        if not isinstance(item, str):
            return list(item)
        if self.tokenizer is None:
            raise ConfigError("a text prompt needs a tokenizer; give LLM(tokenizer=...), or token ids")
        return self.tokenizer.encode(item)

    def _requests(self, ids: list[int], params: SamplingParams, priority: int) -> list[_Carried]:
        """The requests of one prompt: `n` of them, which share the prompt's blocks."""
        number = next(_ids)
        banned = banned_ids(self.tokenizer, params.bad_words) if params.bad_words else ()
        carried: list[_Carried] = []
        for i in range(params.n):
            own = params.replace(seed=params.seed + i) if params.seed is not None else params
            request = Request(
                request_id=f"llm-{number}-{i}",
                prompt_token_ids=ids,
                params=own,
                eos_token_ids=end_ids(self.model, self.tokenizer),
                priority=priority,
                banned=banned,
                parent=carried[0].request if carried else None,
            )
            detokenizer = None
            if self.tokenizer is not None and params.detokenize:
                detokenizer = Detokenizer(self.tokenizer, ids, params)
                if params.stop:
                    request.stop_check = StopStrings(detokenizer, params)
            carried.append(_Carried(request, detokenizer))
        return carried


class _Carried:
    """A request, and what makes text of it."""

    def __init__(self, request: Request, detokenizer: Detokenizer | None) -> None:
        self.request = request
        self._detokenizer = detokenizer

    def text(self) -> str:
        """The output's text; one whose stop check decoded along has it already."""
        if self._detokenizer is None:
            return ""
        if isinstance(self.request.stop_reason, str):
            return self._detokenizer.text
        self._detokenizer.add(self.request.output_token_ids[self._detokenizer.num_added :], last=True)
        return self._detokenizer.text


class _Progress:
    """The progress bar: requests done, with input and output tokens a second."""

    def __init__(self, groups: Sequence[Sequence[_Carried]], show: bool) -> None:
        self._bar = tqdm(total=len(groups), desc="Processed prompts", disable=not show, dynamic_ncols=True)
        self._input = self._output = 0
        for group in groups if show else ():
            left = [len(group)]
            for one in group:
                one.request.on_token = lambda request, left=left: self._update(request, left)

    def _update(self, request: Request, left: list[int]) -> None:
        if not request.finished:
            return
        self._output += request.num_output
        left[0] -= 1
        if left[0] == 0:
            self._input += len(request.prompt_token_ids)
            seconds = max(self._bar.format_dict["elapsed"], 1e-9)
            self._bar.set_postfix_str(
                f"est. speed input: {self._input / seconds:.2f} toks/s, output: {self._output / seconds:.2f} toks/s"
            )
            self._bar.update()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()


def _output(prompt: str | None, group: Sequence[_Carried], tokenizer: Any) -> RequestOutput:
    first = group[0].request
    outputs = [
        CompletionOutput(
            index=index,
            text=one.text(),
            token_ids=one.request.output_token_ids,
            cumulative_logprob=one.request.cumulative_logprob,
            logprobs=_with_text(one.request.logprobs, tokenizer),
            finish_reason=one.request.finish_reason,
            stop_reason=one.request.stop_reason,
        )
        for index, one in enumerate(group)
    ]
    return RequestOutput(
        request_id=first.request_id,
        prompt=prompt,
        prompt_token_ids=first.prompt_token_ids,
        outputs=outputs,
        finished=True,
        prompt_logprobs=_with_text(first.prompt_logprobs, tokenizer),
        metrics=first.metrics,
        num_cached_tokens=first.num_cached or 0,
    )


def _with_text(entries: Any, tokenizer: Any) -> Any:
    """Log-probabilities with the text of each token."""
    if entries is None or tokenizer is None:
        return entries
    return [
        entry and {i: Logprob(x.logprob, x.rank, tokenizer.decode([i])) for i, x in entry.items()} for entry in entries
    ]


def _longest_first(request: Request) -> float:
    return -(request.params.max_tokens or math.inf)


def _is_share(value: object) -> bool:
    """Whether it is a number in (0, 1]."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 < value <= 1.0


def _check_nothing_to_load(**options: Any) -> None:
    """Refuse options for loading beside a model that is there already."""
    for name, value in options.items():
        if value:
            raise ConfigError(f"{name}={value!r} is for loading a model by name; this one is loaded already")


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Many prompts, from one or many."""
    if isinstance(prompts, (str, Mapping)) or (prompts and isinstance(prompts[0], int)):
        return [cast("Prompt", prompts)]
    return list(cast("Sequence[Prompt]", prompts))


def _text_of(item: Prompt) -> str | None:
    return item.get("prompt") if isinstance(item, Mapping) else None


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
