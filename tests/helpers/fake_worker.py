"""Stands for `fastattn.bench.users.worker` in a process of its own: what a row does is in its name."""

import json
import os
import sys
import time

MARK = "\x1e"  #: the worker's; a process that does not import it starts at once


def say(message):
    print(f"{MARK}{json.dumps(message)}", flush=True)


if __name__ == "__main__":
    settings, *names = sys.argv[1:]
    for name in names:
        say({"begin": name})
        say({"trying": "fastattn"})
        skip = json.loads(settings)["skip"].get(name, {})
        if name.startswith("bad peer") and "torch-cudnn" not in skip:
            say({"trying": "torch-cudnn"})
            print("CUDA error: of a peer", file=sys.stderr, flush=True)
            os._exit(3)
        if name.startswith("poison"):
            print("CUDA error: an illegal memory access was encountered", file=sys.stderr, flush=True)
            os._exit(3)
        if name.startswith("silent"):
            os._exit(4)
        if name.startswith("hang"):
            time.sleep(600)
        while name.startswith("chatty"):
            print("a line", flush=True)
        print("a line of somebody else's")
        print("no end of line: ", end="")
        say({"row": name, "found": {"fastattn": {"pid": os.getpid(), "phase": json.loads(settings)["phase"]}}})
