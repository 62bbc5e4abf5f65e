"""A job of `benchmarks.figures` that measures nothing: `python fake_job.py WORD [SECONDS] --json FILE`.

It sleeps, and writes what it was given and when it ran. WORD: "good"; "wrong": exit status 3; "silent": no file; "cut":
half a file; "foreign": a file of another commit; "parent": starts another process, whose id it prints, and waits for
it; "stubborn": the same, and neither of them hears SIGTERM.
"""

import json
import os
import signal
import subprocess
import sys
import time

if __name__ == "__main__":
    word, seconds = sys.argv[1], float(sys.argv[2])
    file = sys.argv[sys.argv.index("--json") + 1]
    begun = time.monotonic()
    if word == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if word in ("parent", "stubborn"):
        child = subprocess.Popen(["sleep", "60"])  # what is ignored is inherited
        print("child", child.pid, flush=True)
        child.wait()
    print(f"{word} begins", flush=True)
    time.sleep(seconds)
    data = {
        "command": os.environ["FASTATTN_COMMAND"],
        "environment": {"commit": "of another day" if word == "foreign" else os.environ["FASTATTN_COMMIT"]},
        "gpus": os.environ["CUDA_VISIBLE_DEVICES"].split(","),
        "compile": os.environ.get("FASTATTN_COMPILE"),
        "ran": [begun, time.monotonic()],
        "left_out": sys.argv[3 : sys.argv.index("--json")],
    }
    text = json.dumps(data)
    if word != "silent":
        with open(file, "w") as out:
            out.write(text[:20] if word == "cut" else text)
    if word == "wrong":
        print("a figure\nValueError: oh no", file=sys.stderr)
        sys.exit(3)
