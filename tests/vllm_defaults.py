"""The options of vLLM 0.25.1's `LLM` and its engine, with their defaults, as its published wheel has them."""

from __future__ import annotations

from typing import Any

_DEFAULTS: list[tuple[Any, str]] = [
    (
        False,
        "enable_return_routed_experts skip_tokenizer_init enable_prompt_embeds trust_remote_code "
        "numa_bind data_parallel_hybrid_lb data_parallel_external_lb "
        "data_parallel_multi_port_external_lb enable_expert_parallel enable_ep_weight_filter "
        "enable_elastic_ep enable_dbo enable_eplb disable_sliding_window use_fp64_gumbel "
        "disable_log_stats aggregate_engine_logging allow_deprecated_quantization enforce_eager "
        "disable_custom_all_reduce language_model_only enable_mm_embeds interleave_mm_strings "
        "mm_encoder_only skip_mm_profiling enable_lora fully_sharded_loras enable_tower_connector_lora "
        "specialize_active_lora enable_mixed_moe_lora_format ray_workers_use_nsight "
        "disable_chunked_mm_input kv_cache_metrics cudagraph_metrics enable_layerwise_nvtx_tracing "
        "enable_mfu_metrics enable_logging_iteration_details jit_monitor_verbose "
        "enable_mm_processor_stats enable_sleep_mode enable_cumem_allocator calculate_kv_scales "
        "enable_mamba_cache_stochastic_rounding kv_sharing_fast_prefill tokens_only "
        "fail_on_environ_validation",
    ),
    ("", "model_weights allowed_local_media_path reasoning_parser worker_extension_cls"),
    (
        None,
        "served_model_name hf_config_path allowed_media_domains download_dir safetensors_load_strategy "
        "max_model_len cudagraph_capture_sizes max_cudagraph_capture_size ir_op_priority "
        "distributed_executor_backend distributed_timeout_seconds cpu_distributed_timeout_seconds "
        "numa_bind_nodes numa_bind_cpus device_ids data_parallel_rank data_parallel_start_rank "
        "data_parallel_size_local data_parallel_address data_parallel_rpc_port "
        "disable_nccl_for_dp_synchronization eplb_config max_parallel_loading_workers block_size "
        "enable_prefix_caching kv_cache_memory_bytes max_num_batched_tokens max_num_seqs revision "
        "code_revision hf_token tokenizer_revision quantization quantization_config mm_processor_kwargs "
        "mm_encoder_attn_backend mm_encoder_attn_dtype mm_encoder_fp8_scale_path "
        "mm_encoder_fp8_scale_save_path io_processor_plugin video_pruning_rate default_mm_loras "
        "max_cpu_loras lora_target_modules num_gpu_blocks_override enable_chunked_prefill "
        "disable_hybrid_kv_cache_manager structured_outputs_config reasoning_parser_plugin "
        "speculative_config spec_method spec_model spec_tokens diffusion_config "
        "show_hidden_metrics_for_version otlp_traces_endpoint collect_detailed_traces scheduler_cls "
        "pooler_config compilation_config attention_config mamba_config kernel_config "
        "enable_flashinfer_autotune profiler_config kv_transfer_config kv_events_config "
        "ec_transfer_config reasoning_config override_attention_dtype attention_backend mamba_block_size "
        "logits_processors async_scheduling kv_offloading_size weight_transfer_config "
        "gdn_prefill_backend",
    ),
    (
        "auto",
        "runner convert tokenizer_mode load_format config_format dtype kv_cache_dtype moe_backend "
        "linear_backend offload_backend lora_dtype worker_cls generation_config model_impl "
        "mamba_cache_dtype mamba_ssm_cache_dtype",
    ),
    (8, "safetensors_prefetch_num_threads safetensors_prefetch_block_size"),
    (
        0,
        "seed node_rank ubatch_size cpu_offload_gb offload_group_size long_prefill_token_threshold "
        "mm_ipc_gpu_memory_gb mamba_cache_philox_rounds shutdown_timeout",
    ),
    (
        1,
        "pipeline_parallel_size nnodes tensor_parallel_size prefill_context_parallel_size "
        "decode_context_parallel_size dcp_kv_cache_interleave_size cp_kv_cache_interleave_size "
        "data_parallel_size offload_num_in_group offload_prefetch_step max_num_partial_prefills "
        "max_long_partial_prefills renderer_num_workers max_loras prefill_schedule_interval "
        "stream_interval",
    ),
    ("127.0.0.1", "master_addr"),
    (29501, "master_port"),
    ("ag_rs", "dcp_comm_backend"),
    ("mp", "data_parallel_backend"),
    ("allgather_reducescatter", "all2all_backend"),
    (32, "dbo_decode_token_threshold"),
    (512, "dbo_prefill_token_threshold"),
    ("linear", "expert_placement_strategy"),
    ("sha256", "prefix_caching_hash_algo"),
    (True, "disable_cascade_attn scheduler_reserve_full_isl use_tqdm_on_load"),
    (set(), "cpu_offload_params offload_params"),
    (0.92, "gpu_memory_utilization"),
    (20, "max_logprobs"),
    ("raw_logprobs", "logprobs_mode"),
    (
        {},
        "hf_overrides model_class_overrides limit_mm_per_prompt media_io_kwargs "
        "model_loader_extra_config override_generation_config additional_config",
    ),
    (4, "mm_processor_cache_gb"),
    ("lru", "mm_processor_cache_type"),
    (128, "mm_shm_cache_max_object_size_mb"),
    ("weights", "mm_encoder_tp_mode"),
    (1.5, "mm_encoder_fp8_scale_save_margin"),
    ("direct_rpc", "mm_tensor_ipc"),
    (16, "max_lora_rank"),
    (["original/**/*"], "ignore_patterns"),
    (0.0, "watermark"),
    (0.01, "kv_cache_metrics_sample"),
    ("warn", "jit_monitor_mode"),
    ("fcfs", "scheduling_policy"),
    ([], "kv_cache_dtype_skip_layers"),
    ("none", "mamba_cache_mode"),
    ("triton", "mamba_backend"),
    ("cpu", "pt_load_map_location"),
    (2, "optimization_level"),
    ("balanced", "performance_mode"),
    ("native", "kv_offloading_backend"),
]
DEFAULTS: dict[str, Any] = {name: value for value, names in _DEFAULTS for name in names.split()}
