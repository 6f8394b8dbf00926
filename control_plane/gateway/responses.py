"""Where stored responses live: ``/v1/responses/{id}`` and ``previous_response_id`` go to the instance that made the response."""

from __future__ import annotations

import re
from collections import OrderedDict

from control_plane.errors import InvalidRequest, NoInstanceAvailable, ResponseNotFound
from control_plane.fleet import Fleet
from control_plane.job import LaneKey
from control_plane.types import ExecutionInstance, HealthStatus, RequestKind

_ID = re.compile(rb'"id": ?"(resp_[\w-]{1,200})"').search
_PATH = re.compile(r"/v1/responses/([\w-]{1,200})(/cancel|/input_items)?").fullmatch


def response_id_in(data: bytes) -> str | None:
    """The first response id in the bytes of an answer or of its first events."""
    found = _ID(data)
    return None if found is None else found[1].decode()


def response_path(path: str) -> tuple[str, str] | None:
    """The id and what follows it ("", ``/cancel``, ``/input_items``) in a path below ``/v1/responses/``."""
    found = _PATH(path)
    return None if found is None else (found[1], found[2] or "")


class ResponseHomes:
    """Response id -> instance id; the least recently used are forgotten beyond ``max_entries``."""

    def __init__(self, fleet: Fleet, max_entries: int) -> None:
        self._fleet = fleet
        self._max_entries = max_entries
        self._homes: OrderedDict[str, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._homes)

    def remember(self, response_id: str, instance_id: str) -> None:
        self._homes[response_id] = instance_id
        self._homes.move_to_end(response_id)
        if len(self._homes) > self._max_entries:
            self._homes.popitem(last=False)

    def forget(self, response_id: str) -> None:
        self._homes.pop(response_id, None)

    def find(self, response_id: str, param: str) -> str:
        """The instance that holds it. One that is not remembered (we were restarted) can only be on the sole instance there is.

        Raises ResponseNotFound, naming ``param``, when nobody knows it or its instance is gone.
        """
        home = self._homes.get(response_id)
        if home is None:
            instances = self._fleet.servers()
            if len(instances) != 1:
                raise ResponseNotFound(f"No response {response_id!r} is known here; it may be too old.", param=param)
            return instances[0].instance_id
        self._homes.move_to_end(response_id)
        if self._fleet.get(home) is None:
            raise gone(response_id, home, param)
        return home

    def find_previous(self, response_id: str, model: str) -> str:
        """The instance that holds the response before one that ``model`` is to make. Raises as :meth:`find` and :meth:`check` do, and
        InvalidRequest when that instance does not serve the model."""
        home = self.find(response_id, "previous_response_id")
        instance = self._fleet.get(home)
        if instance is not None and instance.model_name and not instance.serves(model):
            raise InvalidRequest(f"response {response_id!r} is on an instance that does not serve {model!r}", param="previous_response_id")
        self.check(response_id, home, "previous_response_id", new_work=True)
        return home

    def check(self, response_id: str, home: str, param: str, *, new_work: bool) -> ExecutionInstance:
        """The instance; what waiting would not mend is refused at once. ``new_work``: a response is to be made there, not only looked up.

        Raises ResponseNotFound when its instance is down (what it held is lost with its process), NoInstanceAvailable when new work
        is asked of one that takes none.
        """
        instance = self._fleet.get(home)
        if instance is None:
            raise gone(response_id, home, param)
        kind = RequestKind.CHAT if new_work else RequestKind.ANY
        if instance.health_status == HealthStatus.UNHEALTHY and not self._fleet.eligible(LaneKey(instance.model_name, kind, home)):
            raise gone(response_id, home, param)
        if new_work and (instance.health_status == HealthStatus.DRAINING or not instance.is_available):
            raise NoInstanceAvailable(f"Response {response_id!r} is on instance {home!r}, which takes no new work now.", param=param)
        return instance


def gone(response_id: str, home: str, param: str) -> ResponseNotFound:
    return ResponseNotFound(f"Response {response_id!r} was on instance {home!r}, which is gone.", param=param)
