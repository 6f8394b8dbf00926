"""Reading what a vLLM server tells: its metrics page and its model list, whole, odd and broken."""

from __future__ import annotations

import pytest

from control_plane.fleet import parse_metrics, parse_models

#: from a real vLLM 0.32.0 after 250 requests: the lines that are read, and neighbours that look like them
PAGE = b"""\
# HELP process_start_time_seconds Start time of the process since unix epoch in seconds.
# TYPE process_start_time_seconds gauge
process_start_time_seconds 1.79549389236e+09
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tiny"} 0.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="tiny"} 0.0
# HELP vllm:num_requests_waiting_by_reason Number of waiting requests by reason. Reason labels: 'capacity' = waiting for scheduling capacity; 'deferred' = deferred by transient constraints (LoRA budget, KV transfer, blocked status). Sum of all reasons equals vllm:num_requests_waiting.
# TYPE vllm:num_requests_waiting_by_reason gauge
vllm:num_requests_waiting_by_reason{engine="0",model_name="tiny",reason="capacity"} 0.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="tiny",reason="deferred"} 0.0
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.0
# HELP vllm:prefix_cache_queries_total Prefix cache queries, in terms of number of queried tokens.
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="tiny"} 6613.0
# HELP vllm:prefix_cache_queries_created Prefix cache queries, in terms of number of queried tokens.
# TYPE vllm:prefix_cache_queries_created gauge
vllm:prefix_cache_queries_created{engine="0",model_name="tiny"} 1.7954939120209436e+09
# HELP vllm:prefix_cache_hits_total Prefix cache hits, in terms of number of cached tokens.
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0",model_name="tiny"} 0.0
# HELP vllm:prefix_cache_hits_created Prefix cache hits, in terms of number of cached tokens.
# TYPE vllm:prefix_cache_hits_created gauge
vllm:prefix_cache_hits_created{engine="0",model_name="tiny"} 1.7954939120209563e+09
# HELP vllm:external_prefix_cache_queries_total External prefix cache queries from KV connector cross-instance cache sharing, in terms of number of queried tokens.
# TYPE vllm:external_prefix_cache_queries_total counter
vllm:external_prefix_cache_queries_total{engine="0",model_name="tiny"} 0.0
# HELP vllm:num_preemptions_total Cumulative number of preemption from the engine.
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{engine="0",model_name="tiny"} 0.0
# HELP vllm:num_preemptions_created Cumulative number of preemption from the engine.
# TYPE vllm:num_preemptions_created gauge
vllm:num_preemptions_created{engine="0",model_name="tiny"} 1.7954939120210133e+09
# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="tiny"} 6653.0
# HELP vllm:prompt_tokens_created Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_created gauge
vllm:prompt_tokens_created{engine="0",model_name="tiny"} 1.7954939120210223e+09
# HELP vllm:prompt_tokens_by_source_total Number of prompt tokens by source.
# TYPE vllm:prompt_tokens_by_source_total counter
vllm:prompt_tokens_by_source_total{engine="0",model_name="tiny",source="local_compute"} 6653.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="tiny",source="local_cache_hit"} 0.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="tiny",source="external_kv_transfer"} 0.0
# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="tiny"} 914.0
# HELP vllm:generation_tokens_created Number of generation tokens processed.
# TYPE vllm:generation_tokens_created gauge
vllm:generation_tokens_created{engine="0",model_name="tiny"} 1.7954939120211399e+09
vllm:iteration_tokens_total_count{engine="0",model_name="tiny"} 862.0
vllm:iteration_tokens_total_sum{engine="0",model_name="tiny"} 7567.0
# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{_block_size_resolved="True",block_size="128",cache_dtype="auto",cache_hit_alignment_tokens="None",effective_attention_block_size="128",enable_mamba_shared_prefix_checkpoint="False",enable_prefix_caching="True",engine="0",gpu_memory_utilization="0.92",hash_block_size="None",is_attention_free="False",kv_cache_dtype_skip_layers="[]",kv_cache_layout="None",kv_cache_max_concurrency="128.0",kv_cache_memory_bytes="1073741824",kv_cache_size_tokens="524288",kv_offloading_backend="native",kv_offloading_size="None",kv_sharing_fast_prefill="False",mamba_block_size="None",mamba_cache_dtype="auto",mamba_cache_mode="none",mamba_page_size_padded="None",mamba_ssm_cache_dtype="float32",num_cpu_blocks="None",num_gpu_blocks="4096",num_gpu_blocks_override="None",prefix_cache_retention_interval="0",prefix_caching_hash_algo="sha256",prefix_match_unit="None",replayssm_buffer_len="16",skip_page_size_padded="None",sliding_window="None",swa_bounded_replay="True",use_kda_recoverssm="False",use_replayssm="False",user_specified_block_size="False"} 1.0
"""  # noqa: E501
MODELS = (
    b'{"object":"list","data":[{"id":"tiny","object":"model","created":1795492790,"owned_by":"vllm","root":"/models/'
    b'tiny-llama","parent":null,"max_model_len":4096,"permission":[{"id":"modelperm-b44022193607c2f9","object":"mode'
    b'l_permission","created":1795492790,"allow_create_engine":false,"allow_sampling":true,"allow_logprobs":true,"al'
    b'low_search_indices":false,"allow_view":true,"allow_fine_tuning":false,"organization":"*","group":null,"is_bloc'
    b'king":false}]}]}'
)


def test_a_real_page_is_read() -> None:
    scrape = parse_metrics(PAGE)
    assert scrape.missing == ()
    assert (scrape.running, scrape.waiting, scrape.kv_cache_usage) == (0, 0, 0.0)
    assert (scrape.prompt_tokens, scrape.generation_tokens, scrape.preemptions) == (6653, 914, 0)
    assert (scrape.prefix_cache_queries, scrape.prefix_cache_hits) == (6613, 0)
    assert (scrape.kv_block_size_tokens, scrape.kv_block_count, scrape.prefix_caching) == (128, 4096, True)
    assert scrape.started_at == 1.79549389236e09


def test_data_parallel_engines_are_summed_and_their_cache_usage_averaged() -> None:
    page = b"""\
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:num_requests_waiting{engine="1",model_name="m"} 0.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.25
vllm:cache_config_info{block_size="16",enable_prefix_caching="False",engine="0",num_gpu_blocks="100"} 1.0
vllm:cache_config_info{block_size="16",enable_prefix_caching="False",engine="1",num_gpu_blocks="120"} 1.0
"""
    scrape = parse_metrics(page)
    assert (scrape.running, scrape.waiting, scrape.kv_cache_usage) == (7, 1, 0.375)
    assert (scrape.kv_block_count, scrape.kv_block_size_tokens, scrape.prefix_caching) == (220, 16, False)


def test_missing_series_are_named_and_nothing_else_suffers() -> None:
    without = b"".join(line + b"\n" for line in PAGE.splitlines() if not line.startswith(b"vllm:num_requests_waiting{"))
    scrape = parse_metrics(without)
    assert scrape.waiting is None
    assert scrape.missing == ("vllm:num_requests_waiting",)
    assert scrape.prompt_tokens == 6653


def test_names_of_older_versions_are_understood() -> None:
    page = PAGE.replace(b"vllm:kv_cache_usage_perc{", b"vllm:gpu_cache_usage_perc{").replace(b'"} 0.0', b'"} 0.75')
    scrape = parse_metrics(page)
    assert scrape.kv_cache_usage == 0.75
    assert scrape.missing == ()


def test_the_counters_birth_stands_in_for_a_missing_process_start() -> None:
    page = b"".join(line + b"\n" for line in PAGE.splitlines() if not line.startswith(b"process_start"))
    assert parse_metrics(page).started_at == 1.7954939120210223e09


@pytest.mark.parametrize(
    "line",
    [
        b'vllm:num_requests_running{model_name="a} 9 b",engine="0"} 5.0',
        b"vllm:num_requests_running 5",
        b'vllm:num_requests_running{engine="0"} 5.0 1795492790000',
        b'vllm:num_requests_running{engine="0"} 5e0',
    ],
    ids=["brace and number in a label", "no labels", "timestamp", "exponent"],
)
def test_odd_but_legal_lines(line: bytes) -> None:
    assert parse_metrics(b"# HELP x vllm:num_requests_running 7\n" + line).running == 5


@pytest.mark.parametrize(
    "page",
    [
        b"",
        b"<html>not found</html>",
        b"vllm:num_requests_running",
        b'vllm:num_requests_running{engine="0"} NaN\n',
        b'vllm:num_requests_running{engine="0"}\n',
        b"\xff\xfe vllm:num_requests_running \x00",
    ],
)
def test_anything_else_gives_nothing(page: bytes) -> None:
    scrape = parse_metrics(page)
    assert scrape.running is None
    assert scrape.kv_block_count is None
    assert len(scrape.missing) == 9


def test_a_real_model_list_is_read() -> None:
    (card,) = parse_models(MODELS)
    assert card == ("tiny", None, 4096, False)


def test_base_models_come_before_their_adapters() -> None:
    body = b'{"data":[{"id":"lora","parent":"base"},{"id":"base","parent":null,"max_model_len":8192,"simulated":true}]}'
    assert parse_models(body) == [("base", None, 8192, True), ("lora", "base", None, False)]


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"data":[1]}', b'{"data":null}', b'{"data":[{}]}', b"<html>", b"\xff"])
def test_what_is_no_model_list_says_so(body: bytes) -> None:
    with pytest.raises(ValueError, match="not a list of models"):
        parse_models(body)
