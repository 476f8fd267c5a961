#!/usr/bin/env bash
# Compiles csrc/cpu with a second compiler and standard library, clang and libc++ (package ziglang), for Linux and for
# Windows: every source with the flags of its instruction set, as setup.py builds it.
#
#   .ci/second_compiler.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export ZIG_GLOBAL_CACHE_DIR=$work/zig ZIG_LOCAL_CACHE_DIR=$work/zig

# "source flags" a line.
"$python" - > "$work/sources" <<'PYTHON'
import runpy
from pathlib import Path

import setuptools

setuptools.setup = lambda **_: None  # the flags are wanted, not a build
setup = runpy.run_path("setup.py")
for source in sorted(Path("csrc/cpu").rglob("*.cpp")):
    flags = setup["ISA_FLAGS"].get(setup["isa_of"](source) or "", [])
    print(source, *flags)
PYTHON

for target in x86_64-linux-gnu x86_64-windows-gnu; do
  defines="-DFASTVQ_VNNI -DFASTVQ_EMULATED"
  [ $target = x86_64-linux-gnu ] && defines="$defines -DFASTVQ_AMX"
  export target defines python work
  # shellcheck disable=SC2016
  { [ $target = x86_64-linux-gnu ] && cat "$work/sources" || grep -v _amx.cpp "$work/sources"; } |
    xargs -P "$(nproc)" -L 1 bash -c '
      "$python" -m ziglang c++ -target $target -std=c++17 -O0 -c -Wall -Wextra -Werror -Wno-psabi \
        -Wno-unknown-warning-option -o "$work/$(tr / _ <<< "$1").o" $defines "${@:2}" "$1" ||
        { echo "$1: $target failed"; exit 255; }' compile
  echo "$target: csrc/cpu compiles"
done
