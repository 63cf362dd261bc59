"""vLLM's options of `LLM`, each with the values that mean what happens here anyway."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hf_paged.config import PagedConfig
from hf_paged.errors import ConfigError

ANY = object()  # Any value is accepted: the option concerns something that isn't done here, or logging.
NOTHING: tuple[Any, ...] = (None, False, 0, "", (), [], {}, set(), frozenset())  # values that ask for nothing
ONE = (None, 1)

DTYPES = {"half": "float16", "float": "float32"}  # vLLM's further names
_RENAMED = {
    "kv_cache_memory_bytes": "kv_memory",
    "num_gpu_blocks_override": "num_blocks",
    "scheduling_policy": "scheduler",
}


def _each(values: Any, names: str) -> dict[str, Any]:
    """The same values for several options, whose names are divided by spaces."""
    return dict.fromkeys(names.split(), values)


# Why other values are refused -> option -> the values that are taken.
_GROUPS: Mapping[str, Mapping[str, Any]] = {
    "the model runs on one device, in this process": {
        "distributed_executor_backend": (None, "uni"),
        "worker_cls": (None, "auto"),
        "device": (None, "auto"),
        **_each(
            ONE,
            "pipeline_parallel_size data_parallel_size data_parallel_size_local prefill_context_parallel_size "
            "decode_context_parallel_size nnodes renderer_num_workers",
        ),
        **_each(
            NOTHING,
            "enable_expert_parallel enable_eplb enable_elastic_ep enable_dbo enable_ep_weight_filter node_rank "
            "data_parallel_rank data_parallel_start_rank data_parallel_address data_parallel_rpc_port "
            "data_parallel_hybrid_lb data_parallel_external_lb data_parallel_multi_port_external_lb device_ids "
            "numa_bind numa_bind_nodes numa_bind_cpus worker_extension_cls ray_workers_use_nsight cpu_offload_gb "
            "cpu_offload_params offload_params offload_group_size kv_offloading_size kv_transfer_config "
            "kv_events_config ec_transfer_config weight_transfer_config",
        ),
        **_each(
            ANY,
            "master_addr master_port distributed_timeout_seconds cpu_distributed_timeout_seconds dcp_comm_backend "
            "dcp_kv_cache_interleave_size cp_kv_cache_interleave_size all2all_backend ubatch_size "
            "dbo_decode_token_threshold dbo_prefill_token_threshold disable_nccl_for_dp_synchronization eplb_config "
            "expert_placement_strategy data_parallel_backend disable_custom_all_reduce max_parallel_loading_workers "
            "offload_backend offload_num_in_group offload_prefetch_step kv_offloading_backend shutdown_timeout",
        ),
    },
    "adapters per request are not there yet; give the model with its adapter, as PEFT loads it": {
        **_each(NOTHING, "enable_lora default_mm_loras enable_prompt_adapter"),
        **_each(
            ANY,
            "max_loras max_lora_rank max_cpu_loras lora_dtype lora_target_modules lora_extra_vocab_size "
            "fully_sharded_loras enable_tower_connector_lora specialize_active_lora enable_mixed_moe_lora_format "
            "enable_lora_bias long_lora_scaling_factors max_prompt_adapters max_prompt_adapter_token",
        ),
    },
    "nothing is quantised here; give a model that Transformers loaded quantised": {
        "kv_cache_dtype": (None, "auto"),
        **_each(
            NOTHING,
            "quantization quantization_config kv_cache_dtype_skip_layers calculate_kv_scales override_attention_dtype",
        ),
        "allow_deprecated_quantization": ANY,
    },
    "load the model with Transformers as you want it, and give it": {
        "tokenizer_mode": (None, "auto", "hf"),
        "load_format": (None, "auto", "hf", "safetensors"),
        "config_format": (None, "auto", "hf"),
        "model_impl": (None, "auto", "transformers"),
        "runner": (None, "auto", "generate"),
        "convert": (None, "auto", "none"),
        "task": (None, "auto", "generate"),
        "hf_token": (None, True),
        **_each(
            NOTHING,
            "model_weights hf_config_path hf_overrides model_class_overrides download_dir code_revision "
            "model_loader_extra_config rope_scaling rope_theta disable_sliding_window",
        ),
        **_each(
            ANY,
            "ignore_patterns safetensors_load_strategy safetensors_prefetch_num_threads "
            "safetensors_prefetch_block_size use_tqdm_on_load pt_load_map_location",
        ),
    },
    "prompts are text and token ids; other inputs go through model.generate()": {
        "mm_encoder_tp_mode": (None, "weights"),
        **_each(
            NOTHING,
            "mm_processor_kwargs media_io_kwargs enable_mm_embeds enable_prompt_embeds mm_encoder_only "
            "io_processor_plugin video_pruning_rate interleave_mm_strings",
        ),
        **_each(
            ANY,
            "limit_mm_per_prompt language_model_only allowed_local_media_path allowed_media_domains "
            "mm_processor_cache_gb mm_processor_cache_type mm_shm_cache_max_object_size_mb mm_encoder_attn_backend "
            "mm_encoder_attn_dtype mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_path "
            "mm_encoder_fp8_scale_save_margin skip_mm_profiling mm_tensor_ipc mm_ipc_gpu_memory_gb "
            "disable_mm_preprocessor_cache disable_chunked_mm_input enable_mm_processor_stats",
        ),
    },
    "say it in SamplingParams, or register a plugin for it": {
        "generation_config": (None, "auto"),
        "max_logprobs": (None, 20),
        "logprobs_mode": (None, "raw_logprobs"),
        "guided_decoding_backend": (None, "auto"),
        **_each(
            NOTHING,
            "override_generation_config logits_processors logits_processor_pattern speculative_config spec_method "
            "spec_model spec_tokens speculative_model num_speculative_tokens diffusion_config pooler_config "
            "override_pooler_config structured_outputs_config reasoning_parser reasoning_parser_plugin "
            "reasoning_config enable_return_routed_experts use_fp64_gumbel tokens_only",
        ),
    },
    "the engine chooses that itself; its own options are those of hf_paged.PagedConfig": {
        "enable_chunked_prefill": (None, True),
        "async_scheduling": (None, True),
        "preemption_mode": (None, "recompute"),
        "moe_backend": (None, "auto"),
        "linear_backend": (None, "auto"),
        "mamba_cache_dtype": (None, "auto"),
        "mamba_ssm_cache_dtype": (None, "auto"),
        "mamba_cache_mode": (None, "none"),
        "performance_mode": (None, "balanced"),
        "optimization_level": (None, 2),
        **_each(
            ONE, "max_num_partial_prefills max_long_partial_prefills num_scheduler_steps prefill_schedule_interval"
        ),
        **_each(
            NOTHING,
            "compilation_config attention_config mamba_config kernel_config profiler_config additional_config "
            "cudagraph_capture_sizes max_cudagraph_capture_size scheduler_cls long_prefill_token_threshold watermark "
            "scheduler_delay_factor num_lookahead_slots enable_sleep_mode enable_cumem_allocator "
            "enable_flashinfer_autotune kv_sharing_fast_prefill mamba_block_size "
            "enable_mamba_cache_stochastic_rounding mamba_cache_philox_rounds gdn_prefill_backend "
            "otlp_traces_endpoint collect_detailed_traces kv_cache_metrics cudagraph_metrics "
            "enable_layerwise_nvtx_tracing enable_mfu_metrics enable_logging_iteration_details "
            "show_hidden_metrics_for_version",
        ),
        **_each(
            ANY,
            "swap_space disable_log_stats aggregate_engine_logging served_model_name stream_interval "
            "prefix_caching_hash_algo disable_cascade_attn scheduler_reserve_full_isl disable_hybrid_kv_cache_manager "
            "max_seq_len_to_capture use_v2_block_manager disable_async_output_proc multi_step_stream_outputs "
            "mamba_backend ir_op_priority jit_monitor_mode jit_monitor_verbose kv_cache_metrics_sample "
            "fail_on_environ_validation",
        ),
    },
}
OPTIONS = {name: (values, why) for why, group in _GROUPS.items() for name, values in group.items()}


def paged_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of LLM that aren't its own arguments -> those of PagedConfig.

    Options of vLLM with another name here are renamed. Those at a value that means what happens here anyway are
    dropped, and so is None where it means vLLM's default. Unknown names stay, for PagedConfig to refuse.

    Raises:
        ConfigError: an option of vLLM has a value that can't be honoured, or the same is given under both names.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(PagedConfig)}
    found: dict[str, Any] = {}
    for name, value in options.items():
        own = _RENAMED.get(name, name)
        if own != name and options.get(own) is not None and value is not None:
            raise ConfigError(f"{name}={value!r} and {own}={options[own]!r} say the same; give one")
        if own in defaults:
            value = None if name == "max_model_len" and _is_same(value, -1) else value
            if value is not None or (defaults[own] is None and own == name):
                found[own] = value
        elif name in OPTIONS:
            check(name, value, *OPTIONS[name])
        else:
            found[name] = value
    return found


def check(name: str, value: Any, taken: Any, why: str) -> None:
    """Refuse a value that isn't among those taken.

    Raises:
        ConfigError: it isn't; the message says why not.
    """
    if taken is not ANY and not any(_is_same(value, one) for one in taken):
        raise ConfigError(f"{name}={value!r} is not supported: {why}")


def _is_same(value: Any, taken: Any) -> bool:
    try:
        return bool(value == taken)
    except (ValueError, TypeError, RuntimeError):  # arrays and tensors are compared element by element
        return False


def check_call(**options: Any) -> None:
    """Refuse arguments of vLLM's `generate` and `chat` that ask for something that isn't there.

    Raises:
        ConfigError: one does.
    """
    known = {
        "lora_request": OPTIONS["enable_lora"],
        "mm_processor_kwargs": OPTIONS["mm_processor_kwargs"],
        "tokenization_kwargs": (NOTHING, "tokenise the prompts yourself, and give their ids"),
    }
    for name, value in options.items():
        check(name, value, *known[name])
