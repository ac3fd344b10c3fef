"""Started by torchrun or accelerate: `clipkit check gradients SETTINGS` as it is, then with a bug in the engine.

Ends with the exit code of the second, after it made sure that the first was 0.
"""

import runpy
import sys

from step_matrix import sabotage


def exit_code():
    try:
        runpy.run_module("clipkit", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        return stop.code or 0
    raise AssertionError("the command line always exits")


sys.argv = ["clipkit", "check", "gradients", *sys.argv[1:]]
arguments = list(sys.argv)
if exit_code() != 0:
    sys.exit("the engine as it is was found wrong")
sys.argv = arguments
with sabotage("gather without gradient"):
    sys.exit(exit_code())
