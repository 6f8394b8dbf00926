"""Every error the control plane raises, with its stable code and its HTTP status.

::

    ControlPlaneError (RuntimeError)
     ├─ InvalidRequest          400  invalid_request       the caller can mend it; `param` names the field
     │   └─ ModelDoesNotFit     400  model_does_not_fit    the parallelism planner: no layout holds the model
     ├─ ModelNotFound           404  model_not_found       lists the models there are
     ├─ RequestNotFound         404  request_not_found     unknown or forgotten request id
     ├─ InstanceNotFound        404  instance_not_found
     ├─ ResponseNotFound        404  response_not_found    the instance that held a stored response is gone
     ├─ Unauthorized            401  unauthorized
     ├─ Forbidden               403  forbidden
     ├─ BudgetExhausted         402  budget_exhausted      no instance is cheap enough for `cost_budget`
     ├─ PayloadTooLarge         413  payload_too_large
     ├─ RateLimited             429  rate_limited
     ├─ QueueFull               429  queue_full
     ├─ BodyMemoryFull          503  body_memory_full      request bodies hold as much memory as they may
     ├─ NoInstanceAvailable     503  no_instance_available
     ├─ DeadlineUnreachable     503  deadline_unreachable
     ├─ Draining                503  draining
     ├─ InstanceFailed          502  instance_failed       the engine broke: refused, hung up, answered garbage
     │   ├─ EngineError         its own status             the engine answered with an error of its own
     │   └─ OutOfDescriptors    503  no_descriptors        this process has no file descriptor left to ask an engine with
     ├─ RequestTimeout          504  timeout
     ├─ RequestCancelled        499  cancelled
     └─ ConfigurationError      500  configuration_error   wrong configuration or option; names the field
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec

#: of a message: what a client or an engine says is quoted in many, and ended requests are remembered with theirs
MAX_MESSAGE = 4_000
#: of a name that a client gave, where it is quoted
MAX_QUOTED = 200


def quoted(text: str) -> str:
    """``text``, cut where it is too long to be quoted whole."""
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}..."


class ControlPlaneError(RuntimeError):
    """Base of all. ``str(error)`` is the message.

    Attributes:
        code: stable, machine-readable; does not change between versions.
        http_status: what the gateway answers.
        param: the field at fault, when one is.
        retry_after_s: seconds after which trying again makes sense, when it does.
    """

    code: ClassVar[str] = "internal_error"
    http_status: int = 500
    error_type: ClassVar[str] = "server_error"
    default_retry_after_s: ClassVar[float | None] = None

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        if len(message) > MAX_MESSAGE:
            message = f"{message[:MAX_MESSAGE]}..."
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s if retry_after_s is not None else self.default_retry_after_s

    def to_openai(self) -> dict[str, Any]:
        """The error in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""
        body = {"message": self.message, "type": self.error_type, "param": self.param, "code": self.code}
        return {"error": body}


class InvalidRequest(ControlPlaneError, ValueError):
    code = "invalid_request"
    http_status = 400
    error_type = "invalid_request_error"


class ModelDoesNotFit(InvalidRequest):
    """No layout holds the model; ``smallest_gpu_count`` (of ``gpu_memory_gb`` each) would."""

    code = "model_does_not_fit"

    def __init__(self, message: str, *, smallest_gpu_count: int | None = None, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.smallest_gpu_count = smallest_gpu_count


class ModelNotFound(ControlPlaneError):
    code = "model_not_found"
    http_status = 404
    error_type = "invalid_request_error"

    def __init__(self, model: str, available: Sequence[str] = ()) -> None:
        known = ", ".join(sorted(available)) or "none yet"
        super().__init__(f"The model `{quoted(model)}` does not exist. Models served here: {known}.", param="model")
        self.model = model
        self.available = tuple(sorted(available))


class RequestNotFound(ControlPlaneError, LookupError):
    code = "request_not_found"
    http_status = 404
    error_type = "invalid_request_error"


class InstanceNotFound(ControlPlaneError, LookupError):
    code = "instance_not_found"
    http_status = 404
    error_type = "invalid_request_error"


class ResponseNotFound(ControlPlaneError, LookupError):
    code = "response_not_found"
    http_status = 404
    error_type = "invalid_request_error"


class Unauthorized(ControlPlaneError):
    code = "unauthorized"
    http_status = 401
    error_type = "authentication_error"


class Forbidden(ControlPlaneError):
    code = "forbidden"
    http_status = 403
    error_type = "permission_error"


class BudgetExhausted(ControlPlaneError):
    code = "budget_exhausted"
    http_status = 402
    error_type = "insufficient_quota"


class PayloadTooLarge(ControlPlaneError):
    code = "payload_too_large"
    http_status = 413
    error_type = "invalid_request_error"


class RateLimited(ControlPlaneError):
    code = "rate_limited"
    http_status = 429
    error_type = "rate_limit_error"
    default_retry_after_s = 1.0


class QueueFull(ControlPlaneError):
    code = "queue_full"
    http_status = 429
    error_type = "rate_limit_error"
    default_retry_after_s = 1.0


class BodyMemoryFull(ControlPlaneError):
    """Request bodies, those being read, waiting and running together, hold as much memory as they may (``max_body_memory_bytes``)."""

    code = "body_memory_full"
    http_status = 503
    error_type = "service_unavailable_error"
    default_retry_after_s = 1.0


class NoInstanceAvailable(ControlPlaneError):
    code = "no_instance_available"
    http_status = 503
    error_type = "service_unavailable_error"
    default_retry_after_s = 5.0


class DeadlineUnreachable(ControlPlaneError):
    code = "deadline_unreachable"
    http_status = 503
    error_type = "service_unavailable_error"
    default_retry_after_s = 1.0


class Draining(ControlPlaneError):
    code = "draining"
    http_status = 503
    error_type = "service_unavailable_error"
    default_retry_after_s = 5.0


class InstanceFailed(ControlPlaneError):
    """The engine broke under the request.

    Attributes:
        instance_id: which one, when known.
        timed_out: it broke by a time limit (a hang, not a crash).
        sent: bytes of the answer had already come when it broke.
        connected: False when no connection to it could be made.
        reached: the request may have reached it. That is so without a connection too when it was written to a kept one that broke:
            the engine may have died of it.
        retryable: running it again, elsewhere, makes sense as far as the failure itself goes.
    """

    code = "instance_failed"
    http_status = 502

    def __init__(
        self,
        message: str,
        *,
        instance_id: str | None = None,
        timed_out: bool = False,
        sent: bool = False,
        connected: bool = True,
        reached: bool | None = None,
        retryable: bool = True,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.instance_id = instance_id
        self.timed_out = timed_out
        self.sent = sent
        self.connected = connected
        self.reached = connected if reached is None else reached
        self.retryable = retryable


class EngineError(InstanceFailed):
    """The engine answered with an HTTP error: ``status`` and ``body`` are its own and reach the client as they are."""

    def __init__(
        self,
        status: int,
        body: bytes,
        *,
        instance_id: str | None = None,
        content_type: bytes = b"application/json",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(
            engine_message(status, body),
            instance_id=instance_id,
            retryable=status in (408, 429) or status >= 500,
            retry_after_s=retry_after_s,
        )
        self.status = status
        self.http_status = status
        self.body = body
        self.content_type = content_type

    def remembered(self) -> EngineError:
        """The same without most of a long body: so it is kept with its request, of which there are thousands."""
        if len(self.body) <= MAX_MESSAGE:
            return self
        short = EngineError(self.status, self.body[:MAX_MESSAGE], instance_id=self.instance_id, content_type=self.content_type)
        short.args, short.message = self.args, self.message
        short.retry_after_s, short.sent = self.retry_after_s, self.sent
        return short

    @property
    def is_engine_fault(self) -> bool:
        """True for a 5xx: it counts against the instance. A 4xx is the caller's, 408 and 429 are load."""
        return self.status >= 500


class OutOfDescriptors(InstanceFailed):
    """No file descriptor is left here for a connection to an engine. No engine is at fault, and none could be asked instead."""

    code = "no_descriptors"
    http_status = 503
    error_type = "service_unavailable_error"
    default_retry_after_s = 1.0

    def __init__(self, message: str) -> None:
        super().__init__(message, connected=False, retryable=False)


class RequestTimeout(ControlPlaneError):
    code = "timeout"
    http_status = 504
    error_type = "timeout_error"


class RequestCancelled(ControlPlaneError):
    code = "cancelled"
    http_status = 499
    error_type = "invalid_request_error"


class ConfigurationError(ControlPlaneError, ValueError):
    code = "configuration_error"
    error_type = "invalid_request_error"


def engine_message(status: int, body: bytes) -> str:
    """The sentence inside an engine's error body: OpenAI's shape, FastAPI's ``detail``, or the start of the text."""
    try:
        parsed = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        parsed = None
    if isinstance(parsed, dict):
        error = parsed.get("error")
        for found in (error.get("message") if isinstance(error, dict) else error, parsed.get("message"), parsed.get("detail")):
            if isinstance(found, str) and found:
                return found
    text = body[:500].decode("utf-8", "replace").strip()
    return text or f"the engine answered with status {status}"
