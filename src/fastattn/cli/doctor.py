"""`fastattn doctor`: what works on this machine, what does not, and what to install.

Each probe is guarded: a failure becomes a line of the report, not a traceback. The probes import torch and the rest of
the package themselves, for the same reason.
"""

from __future__ import annotations

import json
import platform
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial

from . import machine_probes, own_probes
from .finding import Finding, line


def main(as_json: bool = False) -> int:
    """Prints the report. Returns the exit status: 1 when torch itself is unusable, else 0."""
    findings = examine()
    print(json.dumps([asdict(f) for f in findings], indent=2) if as_json else render(findings))
    return 1 if any(f.subject == "torch" and f.state in ("missing", "broken") for f in findings) else 0


def render(findings: list[Finding]) -> str:
    """The findings as aligned lines, then each piece of advice once."""
    subject, state = max(len(f.subject) for f in findings), max(len(f.state) for f in findings)
    lines = [f"{f.subject:<{subject}}  {f.state:<{state}}  {f.text}" for f in findings]
    advice = dict.fromkeys(f.advice for f in findings if f.advice)
    if advice:
        lines += ["", "To do:", *(f"- {text}" for text in advice)]
    return "\n".join(lines)


def examine() -> list[Finding]:
    """All findings about this machine. Takes seconds; on a GPU it runs each backend once."""
    findings = [Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    findings += _guard("fastattn", machine_probes.fastattn)
    torch = _guard("torch", machine_probes.torch)
    findings += torch
    if torch[0].state != "ok":
        return findings
    for subject, probe in (
        ("GPU", machine_probes.gpu),
        ("cuDNN", machine_probes.cudnn),
        ("cuDNN frontend", machine_probes.frontend),
        ("Triton", machine_probes.triton),
        ("transformers", machine_probes.transformers),
    ):
        findings += _guard(subject, probe)
    for package, without, extra in machine_probes.EXTRAS:
        findings += _guard(package, partial(machine_probes.extra, package, without, extra))
    findings = [machine_probes.untested(finding) for finding in findings]
    for name in own_probes.names():
        findings += _guard(f"backend {name}", partial(own_probes.backend, name))
    findings += _guard("kernels", own_probes.kernels)
    findings += _guard("native calls", own_probes.native)
    findings += _guard("plans on disk", own_probes.plans)
    return findings + _guard("switches", own_probes.switches)


def _guard(subject: str, probe: Callable[[], Iterable[Finding]]) -> list[Finding]:
    found: list[Finding] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.extend(probe())  # findings from before the failure are kept
    except Exception as error:
        found.append(Finding(subject, "broken", line(error)))
    return found
