"""``python -m s2o_compile.cli``."""

from . import main

main()
