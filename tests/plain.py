"""Python in a process that cannot import clipkit: what a person has who was only given the folder.

Scripts are run by forks of one such process, which imports for all of them what they import: transformers and
open_clip alone take longer than most scripts.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

_SERVER = r"""
import ast, contextlib, importlib, json, os, signal, sys, tempfile, traceback, warnings

class Blocker:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "clipkit":
            raise ImportError("clipkit is blocked")

def import_what_it_imports(script):
    # lazy names, too; what fails here fails again in the fork, where it is told
    with contextlib.suppress(Exception):
        for node in ast.walk(ast.parse(script)):
            if isinstance(node, ast.Import):
                for name in node.names:
                    importlib.import_module(name.name)
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for name in node.names:
                    getattr(module, name.name)

def run(script, cwd, environ):
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environ)
    try:
        import clipkit
    except ImportError:
        pass
    else:
        raise SystemExit("clipkit could be imported")
    exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})
    assert "clipkit" not in sys.modules

def fork(script, cwd, environ, out, err):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        signal.alarm(200)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        run(script, cwd, environ)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

sys.meta_path.insert(0, Blocker())
warnings.simplefilter("ignore")
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what an import prints is no answer
for line in sys.stdin:
    asked = json.loads(line)
    import_what_it_imports(asked["script"])
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        code = fork(asked["script"], asked["cwd"], asked["environ"], out, err)
        print(json.dumps({"code": code, "out": (out.seek(0), out.read())[1], "err": (err.seek(0), err.read())[1]}),
              file=answers, flush=True)
"""


@cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen([sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(_stop, server)
    return server


def _stop(server: subprocess.Popen[str]) -> None:
    server.communicate()  # closes its input, and it ends


def run_plain(script: str, cwd: Path) -> str:
    """Standard output of `script`, run in `cwd`."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    asked: dict[str, Any] = {"script": script, "cwd": str(cwd), "environ": dict(os.environ)}
    server.stdin.write(json.dumps(asked) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, f"the process without clipkit ended with {server.poll()}"
    done = json.loads(answer)
    assert done["code"] == 0, done["err"][-3000:]
    return str(done["out"])
