"""What is in flight on each instance, known first hand: requests that have shown no token yet, their uncached prompts, and contexts.

An engine's own figures lag by seconds; what was sent there and has come back since is known at once. The tokens are as estimated when
a request was placed. Requests that are not streamed show nothing before their end: they count as decoding from the start.
"""

from __future__ import annotations

from typing import Final


class Work:
    """Of one instance."""

    __slots__ = ("context_tokens", "starting", "starting_tokens")

    def __init__(self) -> None:
        #: requests sent whose first token has not come
        self.starting: int = 0
        #: prompt tokens of those that its cache was not believed to hold: what a newcomer's prefill stands behind
        self.starting_tokens: int = 0
        #: prompts and expected answers of all in flight
        self.context_tokens: int = 0

    def sent(self, uncached_tokens: int, context_tokens: int, starts: bool) -> None:
        """``starts``: its first token will be seen."""
        self.context_tokens += context_tokens
        if starts:
            self.starting += 1
            self.starting_tokens += uncached_tokens

    def first_token(self, uncached_tokens: int) -> None:
        self.starting -= 1
        self.starting_tokens -= uncached_tokens

    def ended(self, context_tokens: int) -> None:
        self.context_tokens -= context_tokens


#: of an instance on which nothing is known to be in flight; not to be written to
NO_WORK: Final = Work()


class WorkBook:
    """The work of every instance that has some, by its id."""

    __slots__ = ("_works",)

    def __init__(self) -> None:
        self._works: dict[str, Work] = {}

    def of(self, instance_id: str) -> Work:
        """To be read."""
        found = self._works.get(instance_id)
        return found if found is not None else NO_WORK

    def open(self, instance_id: str) -> Work:
        """To be written to."""
        found = self._works.get(instance_id)
        if found is None:
            found = self._works[instance_id] = Work()
        return found

    def forget(self, instance_id: str) -> None:
        """It left and nothing runs there any more."""
        self._works.pop(instance_id, None)
