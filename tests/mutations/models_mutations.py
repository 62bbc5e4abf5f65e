"""Deliberate mistakes: models, caches, parallel attention, files."""

from __future__ import annotations

from mutation import Mutation

_FILES = ("tests/faults/test_plan_files.py",)
_OTHER_USERS = ("tests/backends/cudnn/test_disk_other_users.py",)

MUTATIONS = (
    Mutation(
        "a damaged plan file is trusted",
        "common/disk.py",
        'if not hmac.compare_digest(hmac.digest(key, body, "sha256"), data[len(self.magic) : start]):',
        "if False:",
        _FILES,
    ),
    Mutation(
        "a plan of another machine is trusted",
        "common/disk.py",
        "if body[8 : 8 + length] != label:",
        "if False:",
        _FILES,
    ),
    Mutation(
        "a plan file that another user may write is trusted",
        "common/folder.py",
        "if info.st_uid != os.geteuid() or info.st_mode & mode:",
        "if False:",
        _OTHER_USERS,
    ),
    Mutation(
        "the directories above the folder of plans are not checked",
        "common/folder.py",
        "            _check_lead(os.fstat(here), path)\n",
        "",
        _OTHER_USERS,
    ),
    Mutation(
        "a copied folder of plans is trusted",
        "common/folder.py",
        'os.fstat(handle).st_ino.to_bytes(8, "little")',
        "bytes(8)",
        _OTHER_USERS,
    ),
    Mutation(
        "files that are no plans are trimmed",
        "common/disk.py",
        "if _OURS.fullmatch(entry.name) else None",
        'if entry.name.endswith((".plan", ".tmp")) else None',
        _OTHER_USERS,
    ),
    Mutation(
        "a terminal executes a result file",
        "common/printable.py",
        "    if character.isprintable():\n        return character\n",
        "    return character\n",
        ("tests/benchmarks/test_hostile_results.py", "-k", "do_nothing or printable"),
    ),
    Mutation(
        "a copied function shares its code",
        "_compat/functions.py",
        'function.__code__.replace(co_name=f"{function.__name__}_with_other_globals")',
        "function.__code__",
        ("tests/lm/fused_ops/test_fused_ops.py", "-k", "other_globals"),
    ),
)
