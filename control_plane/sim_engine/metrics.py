"""``/metrics`` as vLLM 0.32 shows it: the same names, labels, types, help texts and buckets; counted in plain numbers.

Left out: what a simulated engine has nothing to say about (FLOPs, sleep, multi-modal caches, the Python process).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from control_plane.engines.model import EngineModel, ModelSequence
from control_plane.roofline import EngineProfile

if TYPE_CHECKING:
    from control_plane.sim_engine.choices import Choice

_TOKENS: Final = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0)
_ITERATION: Final = (1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)
_FIRST: Final = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
    640.0,
    2560.0,
)
_BETWEEN: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_WHOLE: Final = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_FEW: Final = (1.0, 2.0, 5.0, 10.0, 20.0)
_PREEMPTIONS: Final = (1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0)

#: name, help, buckets; in vLLM's order
_HISTOGRAMS: Final[tuple[tuple[str, str, Sequence[float]], ...]] = (
    ("request_prompt_tokens", "Number of prefill tokens processed.", _TOKENS),
    ("request_generation_tokens", "Number of generation tokens processed.", _TOKENS),
    ("iteration_tokens_total", "Histogram of number of tokens per engine_step.", _ITERATION),
    ("request_max_num_generation_tokens", "Histogram of maximum number of requested generation tokens.", _TOKENS),
    ("request_params_n", "Histogram of the n request parameter.", _FEW),
    ("request_params_max_tokens", "Histogram of the max_tokens request parameter.", _TOKENS),
    ("time_to_first_token_seconds", "Histogram of time to first token in seconds.", _FIRST),
    ("inter_token_latency_seconds", "Histogram of inter-token latency in seconds.", _BETWEEN),
    ("request_time_per_output_token_seconds", "Histogram of time_per_output_token_seconds per request.", _BETWEEN),
    ("e2e_request_latency_seconds", "Histogram of e2e request latency in seconds.", _WHOLE),
    ("request_queue_time_seconds", "Histogram of time spent in WAITING phase for request.", _WHOLE),
    ("request_inference_time_seconds", "Histogram of time spent in RUNNING phase for request.", _WHOLE),
    ("request_prefill_time_seconds", "Histogram of time spent in PREFILL phase for request.", _WHOLE),
    ("request_decode_time_seconds", "Histogram of time spent in DECODE phase for request.", _WHOLE),
    ("request_num_preemptions", "Histogram of the number of times a request was preempted.", _PREEMPTIONS),
    ("request_prefill_kv_computed_tokens", "Histogram of new KV tokens computed during prefill (excluding cached tokens).", _TOKENS),
)
_FINISH_REASONS: Final = ("stop", "length", "abort", "error", "repetition")

_WAITING_HELP: Final = (
    "Number of waiting requests by reason. Reason labels: 'capacity' = waiting for scheduling capacity; 'deferred' = deferred by "
    "transient constraints (LoRA budget, KV transfer, blocked status). Sum of all reasons equals vllm:num_requests_waiting."
)
_EXTERNAL_HELP: Final = "External prefix cache {} from KV connector cross-instance cache sharing, in terms of number of {} tokens."


#: other names for some of the series, and which are not there ("")
DIALECTS: Final[Mapping[str, Mapping[str, str]]] = {
    "vllm": {},
    "vllm-0.8": {
        "vllm:kv_cache_usage_perc": "vllm:gpu_cache_usage_perc",
        "vllm:prefix_cache_queries": "vllm:gpu_prefix_cache_queries",
        "vllm:prefix_cache_hits": "vllm:gpu_prefix_cache_hits",
        "vllm:num_requests_waiting_by_reason": "",
    },
    "sglang": {
        "vllm:num_requests_running": "sglang:num_running_reqs",
        "vllm:num_requests_waiting": "sglang:num_queue_reqs",
        "vllm:kv_cache_usage_perc": "sglang:token_usage",
        "vllm:prompt_tokens": "sglang:prompt_tokens",
        "vllm:prompt_tokens_cached": "sglang:cached_tokens",
        "vllm:generation_tokens": "sglang:generation_tokens",
        "vllm:num_preemptions": "sglang:num_retracted_requests",
        "vllm:time_to_first_token_seconds": "sglang:time_to_first_token_seconds",
        "vllm:": "",
    },
}
#: gauges that are set after each step
_SET_BY_STEPS: Final = frozenset(
    ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:num_requests_waiting_by_reason", "vllm:kv_cache_usage_perc")
)
_SUFFIXES: Final = ("_total", "_created", "_bucket", "_count", "_sum", "")


class _Histogram:
    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


class EngineMetrics:
    """Counts as things happen on one rank; :func:`write_page` writes it all down."""

    __slots__ = ("_histograms", "_http", "_label_sets", "_model", "_model_name", "_rank", "_started_unix_s", "_success")

    def __init__(self, model: EngineModel, model_name: str, started_unix_s: float, rank: int = 0) -> None:
        self._model = model
        self._model_name = model_name
        self._rank = rank
        self._started_unix_s = started_unix_s
        self._histograms = {name: _Histogram(bounds) for name, _, bounds in _HISTOGRAMS}
        self._success = dict.fromkeys(_FINISH_REASONS, 0)
        self._http: dict[tuple[str, str, str], int] = {}
        self._label_sets: dict[str, str] = {}

    def step(self, duration_s: float, decoded: int, prefill_tokens: int, started: int) -> None:
        """One step of the engine: ``decoded`` sequences each waited ``duration_s`` for a token."""
        if decoded:
            self._histograms["inter_token_latency_seconds"].observe(duration_s, decoded)
        self._histograms["iteration_tokens_total"].observe(decoded + prefill_tokens)

    def finished(self, sequence: Choice, speed: float) -> None:
        """A sequence ended by itself. Its times are model seconds; the page shows those that passed on the clock."""
        reason = sequence.generation.finish_reason if sequence.generation else "stop"
        self._success[reason] += 1
        self._observe_times(sequence, speed)
        observe = self._histograms
        observe["request_prompt_tokens"].observe(sequence.prompt_tokens)
        observe["request_generation_tokens"].observe(sequence.generated)
        observe["request_max_num_generation_tokens"].observe(sequence.output_tokens)
        observe["request_params_n"].observe(sequence.reply.options.n)
        observe["request_params_max_tokens"].observe(sequence.limit)
        observe["request_num_preemptions"].observe(sequence.preemptions)
        observe["request_prefill_kv_computed_tokens"].observe(sequence.prompt_tokens - sequence.cached_tokens)

    def _observe_times(self, sequence: ModelSequence, speed: float) -> None:
        observe = self._histograms
        first_s = sequence.first_token_s or sequence.finished_s
        observe["time_to_first_token_seconds"].observe((first_s - sequence.arrival_s) / speed)
        decode_s = (sequence.finished_s - first_s) / speed
        if sequence.generated > 1:
            observe["request_time_per_output_token_seconds"].observe(decode_s / (sequence.generated - 1))
        observe["e2e_request_latency_seconds"].observe((sequence.finished_s - sequence.arrival_s) / speed)
        observe["request_queue_time_seconds"].observe((sequence.scheduled_s - sequence.arrival_s) / speed)
        observe["request_inference_time_seconds"].observe((sequence.finished_s - sequence.scheduled_s) / speed)
        observe["request_prefill_time_seconds"].observe((first_s - sequence.scheduled_s) / speed)
        observe["request_decode_time_seconds"].observe(decode_s)

    def http(self, handler: str, method: str, status: int) -> None:
        key = (handler, method, f"{status // 100}xx")
        self._http[key] = self._http.get(key, 0) + 1

    @property
    def has_run(self) -> bool:
        """Its first step is over."""
        return any(self._histograms["iteration_tokens_total"].counts)

    # ------------------------------------------------------------------ the page

    def families(self) -> list[list[str]]:
        """Every family's lines: help, type, samples. The same families in the same order on every rank."""
        found: list[list[str]] = []
        for family in (self._gauges, self._counters, self._distributions, self._cache_config, self._http_requests):
            for line in family():
                if line.startswith("# HELP"):
                    found.append([])
                found[-1].append(line)
        return found

    def _labels(self, extra: str = "") -> str:
        """The common labels and perhaps one more (``name=value``), sorted by name as the Prometheus client writes them."""
        found = self._label_sets.get(extra)
        if found is None:
            names = {
                "engine": str(self._rank),
                "model_name": self._model_name,
                **dict(part.split("=", 1) for part in extra.split() if part),
            }
            found = self._label_sets[extra] = "{" + ",".join(f'{name}="{names[name]}"' for name in sorted(names)) + "}"
        return found

    def _gauges(self) -> Iterator[str]:
        model = self._model
        yield from self._family("num_requests_running", "gauge", "Number of requests in model execution batches.", {"": model.running})
        yield from self._family("num_requests_waiting", "gauge", "Number of requests waiting to be processed.", {"": model.waiting})
        reasons = {"reason=capacity": model.waiting, "reason=deferred": 0}
        yield from self._family("num_requests_waiting_by_reason", "gauge", _WAITING_HELP, reasons)
        yield from self._family("kv_cache_usage_perc", "gauge", "KV-cache usage. 1 means 100 percent usage.", {"": model.kv_usage})

    def _counters(self) -> Iterator[str]:
        counters, hits = self._model.counters, self._model.counters.prefix_hits
        prefix = "in terms of number of {} tokens."
        sources = {"source=local_compute": counters.prompt_tokens, "source=local_cache_hit": hits, "source=external_kv_transfer": 0}
        rows: tuple[tuple[str, str, Mapping[str, float]], ...] = (
            ("prefix_cache_queries", "Prefix cache queries, " + prefix.format("queried"), {"": counters.prefix_queries}),
            ("prefix_cache_hits", "Prefix cache hits, " + prefix.format("cached"), {"": hits}),
            ("external_prefix_cache_queries", _EXTERNAL_HELP.format("queries", "queried"), {"": 0}),
            ("external_prefix_cache_hits", _EXTERNAL_HELP.format("hits", "cached"), {"": 0}),
            ("num_preemptions", "Cumulative number of preemption from the engine.", {"": counters.preemptions}),
            ("prompt_tokens", "Number of prefill tokens processed.", {"": counters.prompt_tokens + hits}),
            ("prompt_tokens_by_source", "Number of prompt tokens by source.", sources),
            ("prompt_tokens_cached", "Number of cached prompt tokens (local + external).", {"": hits}),
            ("generation_tokens", "Number of generation tokens processed.", {"": counters.generation_tokens}),
        )
        for name, text, values in rows:
            yield from self._counter(name, text, values)
        reasons = {f"finished_reason={reason}": count for reason, count in self._success.items()}
        yield from self._counter("request_success", "Count of successfully processed requests.", reasons)

    def _counter(self, name: str, text: str, values: Mapping[str, float]) -> Iterator[str]:
        yield f"# HELP vllm:{name}_total {text}"
        yield f"# TYPE vllm:{name}_total counter"
        for extra, value in values.items():
            yield f"vllm:{name}_total{self._labels(extra)} {float(value)}"
        yield from self._created(name, text, values)

    def _created(self, name: str, text: str, values: Mapping[str, float]) -> Iterator[str]:
        started = dict.fromkeys(values, self._started_unix_s)
        yield from self._family(name + "_created", "gauge", text, started)

    def _family(self, name: str, kind: str, text: str, values: Mapping[str, float]) -> Iterator[str]:
        yield f"# HELP vllm:{name} {text}"
        yield f"# TYPE vllm:{name} {kind}"
        for extra, value in values.items():
            yield f"vllm:{name}{self._labels(extra)} {float(value)}"

    def _distributions(self) -> Iterator[str]:
        for name, text, bounds in _HISTOGRAMS:
            histogram = self._histograms[name]
            yield f"# HELP vllm:{name} {text}"
            yield f"# TYPE vllm:{name} histogram"
            count = 0
            for bound, within in zip((*map(str, bounds), "+Inf"), histogram.counts, strict=True):
                count += within
                yield f"vllm:{name}_bucket{self._labels('le=' + bound)} {float(count)}"
            yield f"vllm:{name}_count{self._labels()} {float(count)}"
            yield f"vllm:{name}_sum{self._labels()} {float(histogram.total)}"
            yield from self._created(name, text, {"": 0.0})

    def _cache_config(self) -> Iterator[str]:
        profile: EngineProfile = self._model.profile
        blocks, size = self._model.blocks.total, profile.block_size_tokens
        labels = {
            "block_size": size,
            "cache_dtype": "auto",
            "effective_attention_block_size": size,
            "enable_prefix_caching": self._model.blocks.caching,
            "engine": self._rank,
            "gpu_memory_utilization": profile.gpu_memory_utilization,
            "kv_cache_max_concurrency": round(blocks * size / profile.max_model_len_tokens, 2),
            "kv_cache_size_tokens": blocks * size,
            "num_cpu_blocks": None,
            "num_gpu_blocks": blocks,
            "num_gpu_blocks_override": None,
            "prefix_caching_hash_algo": "xxhash",
            "sliding_window": None,
        }
        yield "# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig"
        yield "# TYPE vllm:cache_config_info gauge"
        yield "vllm:cache_config_info{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "} 1.0"

    def _http_requests(self) -> Iterator[str]:
        yield "# HELP http_requests_total Total number of requests by method, status and handler."
        yield "# TYPE http_requests_total counter"
        for (handler, method, status), count in self._http.items():
            yield f'http_requests_total{{handler="{handler}",method="{method}",status="{status}"}} {float(count)}'


def write_page(ranks: Sequence[EngineMetrics], dialect: str) -> bytes:
    """The page of a server with these ranks.

    With several, vLLM has an API process for each, and the client library writes one page of what they all keep in files: without times of
    creation, and without gauges that were never set.
    """
    lines: list[str] = []
    several = len(ranks) > 1
    for families in zip(*(one.families() for one in ranks), strict=True):
        help_line, type_line = families[0][:2]
        name = help_line.split()[2]
        if several and name.endswith("_created"):
            continue
        unset = several and name in _SET_BY_STEPS
        rows = [line for rank, family in zip(ranks, families, strict=True) if rank.has_run or not unset for line in family[2:]]
        if rows or not unset:
            lines += renamed([help_line, type_line, *rows], DIALECTS[dialect])
    return ("\n".join(lines) + "\n").encode()


def renamed(rows: list[str], renames: Mapping[str, str]) -> list[str]:
    """One family under another dialect's names; nothing where that has no such series."""
    if not renames:
        return rows
    name = rows[0].split()[2]
    for suffix in _SUFFIXES:
        new = renames.get(name.removesuffix(suffix)) if suffix == "" or name.endswith(suffix) else None
        if new is not None:
            old = name.removesuffix(suffix)
            return [row.replace(old, new, 1) for row in rows] if new else []
    gone = renames.get(name.partition(":")[0] + ":") == ""
    return [] if gone else rows
