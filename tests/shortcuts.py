"""What torch and Triton do besides their work, left out: a third of the interpreter's time, a sixth of Dynamo's."""

from __future__ import annotations

import inspect
from typing import Any


def patch_languages_once() -> None:
    """Let a launch exchange the functions of `triton.language` once, not at each call of a function within its kernel.

    What such calls exchange again is exchanged already, until the launch ends.
    """
    from triton import language
    from triton.runtime import interpreter

    exchange = interpreter._patch_lang
    done: set[frozenset[str]] = set()

    class Nothing:
        """What a call within a launch has to restore."""

        def restore(self) -> None:
            pass

    def exchange_once(function: Any) -> Any:
        modules = [value for value in function.__globals__.values() if inspect.ismodule(value)]
        key = frozenset(value.__name__ for value in modules if value in (language, language.core))
        if key in done:
            return Nothing()
        scope, is_launch = exchange(function), not done
        if not hasattr(scope, "restore"):  # Releases that never restore.
            return scope
        done.add(key)
        if is_launch:
            restore = scope.restore

            def finish() -> None:
                done.clear()
                restore()

            scope.restore = finish
        return scope

    interpreter._patch_lang = exchange_once


def leave_guards_unmeasured() -> None:
    """Let Dynamo not measure how long each guard takes, for a log that nobody reads; it empties the CPU's caches."""
    from torch._dynamo import guards

    if hasattr(guards, "profile_guard_manager"):
        guards.profile_guard_manager = lambda *arguments: 0.0
