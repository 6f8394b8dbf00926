"""What a client may wish for by headers: priority, targets, budget, tenant. A member of the body with the same meaning wins."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping

from control_plane.errors import InvalidRequest
from control_plane.types import RequestMetadata, RequestPriority

_BUDGET = b"x-cost-budget-usd"
#: header -> the number it sets in RequestMetadata
_NUMBERS = {
    b"x-slo-deadline-ms": "slo_deadline_ms",
    b"x-slo-ttft-ms": "ttft_slo_ms",
    b"x-slo-tpot-ms": "tpot_slo_ms",
    _BUDGET: "cost_budget",
}
#: header -> the text it sets in RequestMetadata
_TEXTS = {
    b"x-user-id": "user_id",
    b"x-session-id": "session_id",
    b"x-gateway-inference-fairness-id": "tenant_id",
}
_PRIORITY = b"x-priority"
_OBJECTIVE = b"x-gateway-inference-objective"
_WHEN_LATE = b"x-when-late"
_MAX_TEXT_BYTES = 256

_ROUTING = frozenset((*_NUMBERS, *_TEXTS, _PRIORITY, _OBJECTIVE, _WHEN_LATE))
_none_of = _ROUTING.isdisjoint


def has_routing_headers(headers: Mapping[bytes, bytes]) -> bool:
    return not _none_of(headers)


def apply_headers(headers: Mapping[bytes, bytes], request: RequestMetadata, given: Container[str]) -> None:
    """Set what the headers wish for, where the body (whose members are named in ``given``) did not. Raises InvalidRequest naming
    the header at fault."""
    for header, name in _NUMBERS.items():
        if header in headers and getattr(request, name) is None:
            setattr(request, name, _number(header, headers[header]))
    for header, name in _TEXTS.items():
        if header in headers and not getattr(request, name):
            setattr(request, name, _text(header, headers[header]) or None)
    if "when_late" not in given and _WHEN_LATE in headers:
        request.when_late = _text(_WHEN_LATE, headers[_WHEN_LATE]).lower()
        if request.when_late not in ("serve", "reject"):
            raise InvalidRequest(f"x-when-late {request.when_late!r} is not one of serve, reject", param="x-when-late")
    _apply_class(headers, request, priority_given="priority" in given)


def _apply_class(headers: Mapping[bytes, bytes], request: RequestMetadata, *, priority_given: bool) -> None:
    """The priority, by its own header or by the gateway API's objective where that names one; the objective stays as a tag."""
    objective = _text(_OBJECTIVE, headers[_OBJECTIVE]) if _OBJECTIVE in headers else ""
    if objective:
        request.tags["objective"] = objective
    if priority_given:
        return
    if _PRIORITY in headers:
        try:
            request.priority = parse_priority(_text(_PRIORITY, headers[_PRIORITY]))
        except InvalidRequest as error:
            raise InvalidRequest(error.message, param="x-priority") from None
    elif objective.upper() in RequestPriority.__members__:
        request.priority = RequestPriority[objective.upper()]


def parse_priority(value: int | str) -> RequestPriority:
    """A name such as ``high``, or vLLM's integer (as a number or in digits). Raises InvalidRequest."""
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            return RequestPriority.parse(value)
    return RequestPriority.from_wire(value)


def _number(header: bytes, value: bytes) -> float:
    name = header.decode()
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number < 0 or (number == 0 and header != _BUDGET):
        shown = value[:64].decode("ascii", "replace")
        right = "a number, 0 or more" if header == _BUDGET else "a finite number of milliseconds above 0"
        raise InvalidRequest(f"{name} is {shown!r}; it must be {right}", param=name)
    return number


def _text(header: bytes, value: bytes) -> str:
    name = header.decode()
    if len(value) > _MAX_TEXT_BYTES:
        raise InvalidRequest(f"{name} is longer than {_MAX_TEXT_BYTES} bytes", param=name)
    try:
        return value.decode().strip()
    except UnicodeDecodeError:
        raise InvalidRequest(f"{name} is not UTF-8", param=name) from None
