"""Who may run at all: is the request well formed, which instances may serve it, is the budget enough, can the deadline be met."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from control_plane.errors import BudgetExhausted, DeadlineUnreachable, InvalidRequest, ModelNotFound, NoInstanceAvailable, quoted
from control_plane.field_rules import wrong
from control_plane.protocols import FleetView
from control_plane.types import ExecutionInstance, ParallelismType, RequestKind, RequestMetadata, RequestPriority

MAX_RETRY_AFTER_S = 60.0

_TEXT_FIELDS = ("user_id", "model_name", "preferred_instance_id", "session_id", "tenant_id")
_TARGET_FIELDS = ("slo_deadline_ms", "ttft_slo_ms", "tpot_slo_ms")


def validate_request(request: RequestMetadata) -> None:
    """Types and ranges of every field that a caller sets. Raises InvalidRequest naming the field (``param``) and what would be right.

    Names given for ``priority``, ``kind`` and ``parallelism_hint`` after construction are turned into their members.
    """
    if not isinstance(request, RequestMetadata):
        raise wrong("request", request, "a RequestMetadata(...)")
    _check_texts(request)
    _check_numbers(request)
    _check_content(request)
    if type(request.priority) is not RequestPriority:
        request.priority = RequestPriority.parse(request.priority)
    if request.kind is not None:
        try:
            request.kind = RequestKind(request.kind)
        except ValueError:
            raise InvalidRequest(f"kind {request.kind!r} is not one of {', '.join(RequestKind)}", param="kind") from None
    if request.parallelism_hint is not None:
        request.parallelism_hint = ParallelismType.parse(request.parallelism_hint)
    if request.when_late not in ("serve", "reject"):
        raise InvalidRequest(f"when_late {quoted(repr(request.when_late))} is not one of serve, reject", param="when_late")


def _check_texts(request: RequestMetadata) -> None:
    if not isinstance(request.request_id, str):
        raise wrong("request_id", request.request_id, "a string (empty: one is generated)")
    if not isinstance(request.billing_tier, str):
        raise wrong("billing_tier", request.billing_tier, "a string")
    for name in _TEXT_FIELDS:
        value = getattr(request, name)
        if value is not None and not isinstance(value, str):
            raise wrong(name, value, "a string or None")


def _check_numbers(request: RequestMetadata) -> None:
    for name in _TARGET_FIELDS:
        _number(request, name, lambda value: value > 0, "a finite number of milliseconds above 0, or None for no target")
    _number(request, "cost_budget", lambda value: value >= 0, "a finite number of US dollars, 0 or more, or None for no budget")
    _number(request, "temperature", lambda value: value >= 0, "a finite number, 0 or more, or None for the engine's default")
    _number(request, "top_p", lambda value: 0 < value <= 1, "a number above 0 and at most 1, or None for the engine's default")
    _count(request, "max_tokens", "a whole number, 0 or more, or None for no limit of ours")
    _count(request, "input_tokens", "a whole number, 0 or more, or None where it is not known")


def _number(request: RequestMetadata, name: str, fits: Callable[[float], bool], right: str) -> None:
    value = getattr(request, name)
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not fits(value):
        raise wrong(name, value, right)


def _count(request: RequestMetadata, name: str, right: str) -> None:
    value = getattr(request, name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise wrong(name, value, right)


def _check_content(request: RequestMetadata) -> None:
    given = [
        name
        for name, there in (
            ("prompt", bool(request.prompt)),
            ("messages", request.messages is not None),
            ("input", request.input is not None),
        )
        if there
    ]
    if len(given) > 1:
        raise InvalidRequest(f"{' and '.join(given)} are given; a request has one of prompt, messages, input: leave one", param=given[1])
    if not _is_text_or_list(request.prompt):
        raise wrong("prompt", request.prompt, "a string, a list of token ids or a list of strings")
    if request.input is not None and not isinstance(request.input, str | list):
        raise wrong("input", request.input, "a string or a list")
    if request.messages is not None and not _is_messages(request.messages):
        raise wrong("messages", request.messages, 'a list of objects such as {"role": "user", "content": "..."}')
    for name in ("extra_body", "tags"):
        if not isinstance(getattr(request, name), Mapping):
            raise wrong(name, getattr(request, name), "a dict with names as keys")
    if not all(isinstance(key, str) for key in request.extra_body):
        raise wrong("extra_body", sorted(map(repr, request.extra_body)), "a dict with names as keys")
    if not isinstance(request.prompt_head, bytes):
        raise wrong("prompt_head", request.prompt_head, "bytes")
    chain = request.prompt_chain
    if chain is not None and not (isinstance(chain, tuple) and all(isinstance(piece, int) for piece in chain)):
        raise wrong("prompt_chain", chain, "a tuple of whole numbers, or None")


def _is_text_or_list(value: object) -> bool:
    if isinstance(value, str):
        return True
    if not isinstance(value, list):
        return False
    return all(type(item) is int and item >= 0 for item in value) or all(isinstance(item, str | list) for item in value)


def _is_messages(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, Mapping) and isinstance(item.get("role"), str) for item in value)


def kind_of(request: RequestMetadata) -> RequestKind:
    """What an engine must be able to do for it: told, or by which of messages, input and prompt is given."""
    if request.kind is not None:
        return request.kind
    if request.messages is not None:
        return RequestKind.CHAT
    return RequestKind.EMBEDDING if request.input is not None else RequestKind.COMPLETION


def serving(request: RequestMetadata, instances: Sequence[ExecutionInstance]) -> list[ExecutionInstance]:
    """Those that serve its model and its kind, usable or not. An instance whose model is not known yet may serve any.

    Raises NoInstanceAvailable for an empty list or when none can do the kind, ModelNotFound when the model is nowhere.
    """
    if not instances:
        raise NoInstanceAvailable("there are no instances to choose from; register one first")
    model = request.model_name
    of_model = [i for i in instances if not model or not i.model_name or i.serves(model)]
    if not of_model:
        raise ModelNotFound(model or "", sorted({name for i in instances for name in i.served_models}))
    kind = kind_of(request)
    able = [i for i in of_model if i.can_do(kind)]
    if not able:
        raise NoInstanceAvailable(f"none of the {len(of_model)} instances of {model or 'the fleet'} serves {kind} requests")
    return able


def eligible(request: RequestMetadata, instances: Sequence[ExecutionInstance]) -> list[ExecutionInstance]:
    """Those of :func:`serving` that are usable and have room; where none has room, the usable ones. Raises as it does, and
    NoInstanceAvailable when none is usable."""
    able = serving(request, instances)
    usable = [i for i in able if i.is_usable]
    if not usable:
        states = ", ".join(sorted({i.health_status if i.is_available else "not available" for i in able}))
        raise NoInstanceAvailable(f"none of the {len(able)} instances that could serve this request is usable ({states})")
    return [i for i in usable if i.active_requests < i.concurrency_limit] or usable


def affordable(request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView) -> Sequence[ExecutionInstance]:
    """Those on which it is predicted to cost no more than ``cost_budget``. Raises BudgetExhausted when none is left."""
    budget = request.cost_budget
    if budget is None or not candidates:
        return candidates
    costs = [view.predictor.cost_usd(request, i) for i in candidates]
    kept = [i for i, cost in zip(candidates, costs, strict=True) if cost <= budget]
    if not kept:
        raise BudgetExhausted(
            f"cost_budget is {budget:.6f} USD; the cheapest of {len(candidates)} instances is predicted to cost {min(costs):.6f} USD",
            param="cost_budget",
        )
    return kept


def lateness_ms(request: RequestMetadata, instance: ExecutionInstance, view: FleetView, elapsed_ms: float = 0.0) -> float:
    """By how much the request would miss its deadline or its TTFT target there, ``elapsed_ms`` after acceptance; 0 or less: met.

    ``-inf`` for a request without either.
    """
    late = -math.inf
    predictor = view.predictor
    start_ms = elapsed_ms + predictor.wait_ms(instance)
    if request.slo_deadline_ms is not None:
        late = start_ms + predictor.service_ms(request, instance) - request.slo_deadline_ms
    if request.ttft_slo_ms is not None:
        first_ms = start_ms + predictor.prefill_ms(instance, predictor.input_tokens(request))
        late = max(late, first_ms - request.ttft_slo_ms)
    return late


def preferred(request: RequestMetadata, candidates: list[ExecutionInstance], view: FleetView) -> list[ExecutionInstance]:
    """Those of ``preferred_instance_id``, else of ``parallelism_hint``, that are predicted to meet the deadline; all where none is."""
    if request.preferred_instance_id is None and request.parallelism_hint is None:
        return candidates
    for liked in (
        [i for i in candidates if request.preferred_instance_id in (i.instance_id, i.server_id)],
        [i for i in candidates if _has_layout(i, request.parallelism_hint)],
    ):
        timely = [i for i in liked if lateness_ms(request, i, view) <= 0.0]
        if timely:
            return timely
    return candidates


def _has_layout(instance: ExecutionInstance, hint: ParallelismType | None) -> bool:
    if hint is None:
        return False
    sizes = {
        ParallelismType.TENSOR_PARALLEL: instance.tensor_parallel_size,
        ParallelismType.PIPELINE_PARALLEL: instance.pipeline_parallel_size,
        ParallelismType.DATA_PARALLEL: instance.data_parallel_size,
        ParallelismType.EXPERT_PARALLEL: instance.expert_parallel_size,
    }
    if hint == ParallelismType.HYBRID:
        return sum(size > 1 for size in sizes.values()) > 1
    return sizes[ParallelismType(hint)] > 1


def admit(request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView, queue_wait_ms: float = 0.0) -> None:
    """Refuse what is hopeless, where its caller set the bounds.

    ``candidates`` are the instances that may serve it (none: it may wait for one, so nothing is refused); ``queue_wait_ms`` is the
    wait ahead of it in the control plane's queue. Raises BudgetExhausted when every instance is too dear for ``cost_budget`` and,
    only with ``when_late="reject"``, DeadlineUnreachable.
    """
    within_budget = affordable(request, candidates, view)
    if request.when_late != "reject" or not within_budget:
        return
    late_ms = min(lateness_ms(request, i, view, queue_wait_ms) for i in within_budget)
    if late_ms <= 0.0:
        return
    hopeless = late_ms > queue_wait_ms
    cause = "even with an empty queue" if hopeless else f"behind {queue_wait_ms:.0f} ms of waiting requests"
    raise DeadlineUnreachable(
        f"the target would be missed by {late_ms:.0f} ms {cause}; give more time or send it with when_late=serve",
        param="slo_deadline_ms" if request.slo_deadline_ms is not None else "ttft_slo_ms",
        retry_after_s=min(MAX_RETRY_AFTER_S, max(1.0, late_ms / 1000.0)),
    )
