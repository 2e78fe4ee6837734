#!/usr/bin/env bash
# torch 2.13.0, Python 3.11: torch.compile(fullgraph=True) refuses a functools.cached_property that was not read before,
# as its lock, which Python has dropped in 3.12, is a context manager that Dynamo does not know. One that was read is
# traced. Seen: "not read before: Unsupported context manager; read before: traced". Exit code 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import functools

import torch


class Settings:
    @functools.cached_property
    def factor(self):
        return 3.0


def outcome(settings):
    torch._dynamo.reset()
    try:
        torch.compile(lambda x: x * settings.factor, fullgraph=True, backend="eager")(torch.ones(2))
    except torch._dynamo.exc.Unsupported as error:
        return str(error).splitlines()[0]
    return "traced"


used = Settings()
assert used.factor == 3.0
found = outcome(Settings()), outcome(used)
print(f"torch {torch.__version__}: not read before: {found[0]}; read before: {found[1]}")
assert found == ("Unsupported context manager", "traced"), "this has changed"
PYTHON
