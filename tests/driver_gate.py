# SPDX-License-Identifier: GPL-2.0-or-later
"""Check the C sources: layout, checkpatch, compiler warnings (W=1), sparse; one line each.

A step that this machine cannot do is skipped by name; with CI or KERNWEAVE_VM=1 that is a failure,
except for checkpatch, which no small package holds (CHECKPATCH names the file).
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from driver_style import file_faults
from kernweave.errors import KernweaveError
from kernweave.lab.build import compiler_args, kernel_compiler
from kernweave.lab.cache import cache_dir
from kernweave.lab.host import check_host_tools, install_line
from kernweave.lab.packages import HeadersTree, fetch_headers_tree, fetch_kernel
from kernweave.lab.tool import ToolTree, fetch_tool

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src/kernweave"
KMOD = PACKAGE / "driver/csrc/kmod"
MUST = bool(os.environ.get("CI")) or os.environ.get("KERNWEAVE_VM") == "1"


def talk(line: str) -> None:
    print(f"  {line}", file=sys.stderr)


def report(step: str, faults: Sequence[str]) -> bool:
    print(f"  {step}: {f'{len(faults)} faults' if faults else 'ok'}", flush=True)
    for fault in faults:
        print(f"    {fault.replace(f'{ROOT}/', '')}")
    return not faults


def skip(step: str, why: str, help: str | None, must: bool = MUST) -> bool:
    print(f"  {step}: {'CANNOT RUN' if must else 'skipped'}, {why}", flush=True)
    if help:
        print(f"    help: {help}")
    return not must


def checkpatch() -> bool:
    script = os.environ.get("CHECKPATCH") or shutil.which("checkpatch.pl")
    if not script:
        help = "set CHECKPATCH=FILE to run it too; it is in Debian's linux-source-6.1, 139 MB"
        return skip("checkpatch", "no checkpatch.pl here (layout is checked above)", help, False)
    options = ["--no-tree", "--file", "--terse", "--show-types", "--no-summary", "--color=never"]
    argv = [
        "perl",
        script,
        *options,
        "--max-line-length=100",
        *map(str, sorted(KMOD.glob("*.[ch]"))),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    faults = done.stdout.splitlines()
    if done.returncode != 0 and not faults:
        faults = done.stderr.splitlines()
    return report("checkpatch", faults)


def compile_kmod(headers: HeadersTree, sparse: ToolTree | None) -> list[str]:
    """Return the lines of compiler and sparse about our sources, or of a failed make."""
    libs = [*headers.libs, *(sparse.libs if sparse else ())]
    env = {"PATH": os.environ["PATH"], "LC_ALL": "C", "LD_LIBRARY_PATH": ":".join(map(str, libs))}
    check = ["C=2", f"CHECK={sparse.binary}"] if sparse else []
    folder = cache_dir() / "builds"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".gate-", dir=folder) as aside:
        work = Path(aside) / "kmod"
        shutil.copytree(KMOD, work)
        compiler = compiler_args(kernel_compiler())
        argv = ["make", "-j2", "-C", str(headers.build), f"M={work}", *compiler, "W=1"]
        done = subprocess.run(
            [*argv, *check, "modules"],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    lines = done.stdout.replace(str(work), str(KMOD)).splitlines()
    # not -Werror: the kernel's own headers may warn under a newer compiler
    faults = [
        line for line in lines if re.match(rf"{re.escape(str(KMOD))}/\S+ (warning|error):", line)
    ]
    return faults if faults or done.returncode == 0 else lines[-20:]


def kbuild(series: str, sparse: ToolTree | None) -> bool:
    step = f"{'W=1 and sparse' if sparse else 'W=1'}, kernel {series}"
    absent = [tool.package for tool in check_host_tools() if not tool.found]
    if absent:
        return skip(step, f"{', '.join(absent)} not installed", install_line(absent))
    try:
        headers = fetch_headers_tree(fetch_kernel(series, talk), talk)
    except KernweaveError as error:
        return skip(step, error.message, error.help)
    return report(step, compile_kmod(headers, sparse))


def warnings() -> bool:
    """Check the guest's programs, which are ordinary C."""
    if shutil.which("gcc") is None:
        return skip("gcc -Wall -Wextra", "gcc is not installed", install_line(["gcc"]))
    agent = PACKAGE / "driver/csrc/agent"
    sources = map(str, [*agent.glob("*.c"), *(PACKAGE / "lab/csrc").glob("*.c")])
    argv = ["gcc", "-fsyntax-only", "-O2", "-Wall", "-Wextra", f"-I{agent}", *sources]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return report("gcc -Wall -Wextra", done.stderr.splitlines())


def get_sparse() -> tuple[ToolTree | None, bool]:
    try:
        return fetch_tool("sparse", talk), True
    except KernweaveError as error:
        return None, skip("sparse", error.message, error.help)


def main(series: Sequence[str]) -> int:
    passed = [report("layout", file_faults([PACKAGE])), checkpatch(), warnings()]
    sparse, had = get_sparse()
    passed += [had, *(kbuild(name, sparse) for name in series)]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["6.1"]))
