#!/usr/bin/env bash
# Builds the CPU kernels with a sanitizer and runs tests on them:
#
#   tests/run_sanitized.sh address|undefined|address,undefined|thread [PYTEST ARGUMENTS]
#
# Without arguments: examples of every op and the tests of the kernels, in a few minutes on two cores. The build is at
# -O1, which keeps accesses that -O3 optimises away. It is made in a copy of the repository, build/sanitized-KIND, where
# the next run compiles only what has changed; the installed extension is left alone. The packages that the tests need
# are those of $PYTHON (python). The first report of a sanitizer ends the run.
set -euo pipefail
cd "$(dirname "$0")/.."

kind=${1-}
case $kind in
  address | undefined | address,undefined | thread) shift ;;
  *) echo "usage: $0 address|undefined|address,undefined|thread [PYTEST ARGUMENTS]" >&2; exit 2 ;;
esac
python=${PYTHON:-python}
cxx=${CXX:-g++}
copy=$PWD/build/sanitized-$kind

# The copy, times of the files kept: ninja compares them.
mkdir -p "$copy"
rm -rf "$copy/fastvq" "$copy/csrc" "$copy/tests"
cp -a fastvq csrc tests benchmarks setup.py pyproject.toml README.md "$copy"
rm -f "$copy"/fastvq/_cpu*.so "$copy"/fastvq/_cuda.*.so
cd "$copy"

export FASTVQ_CUDA=0 FASTVQ_EMULATED_TILES=1
export CXXFLAGS="-O1 -g1 -fno-omit-frame-pointer -fsanitize=$kind -fno-sanitize-recover=all -D_GLIBCXX_ASSERTIONS"
LDFLAGS="-fsanitize=$kind" "$python" setup.py -q build_ext --inplace > build.log 2>&1 || { tail -n 40 build.log; exit 1; }

# Python is not built with the sanitizer, so its runtime has to be loaded first. Behind it comes libstdc++, in which the
# runtime looks for what it replaces: exceptions.
library() { $cxx -print-file-name="$1"; } # $CXX may be "ccache g++"
preload=
case $kind in
  address*) preload=$(library libasan.so) ;;
  undefined) preload=$(library libubsan.so) ;;
  thread) preload=$(library libtsan.so) ;;
esac
preload="$preload $(library libstdc++.so)"

# What torch and Python do is not looked at: they keep memory until the process ends, and torch's own threads are not
# built for ThreadSanitizer.
cat > suppressions.txt <<'END'
called_from_lib:libtorch_cpu.so
called_from_lib:libtorch_python.so
called_from_lib:libgomp
called_from_lib:libc10.so
deadlock:libpython
END
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1:strict_string_checks=1:allocator_may_return_null=1
export UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS=suppressions=$copy/suppressions.txt:ignore_noninstrumented_modules=1:halt_on_error=1
# Examples of every op and the tests that are about kernels; not those that compile or that run no kernel of ours.
[ $# -gt 0 ] || set -- -n 2 --fuzz=200 tests/fuzz tests/ops/test_nearest_kernel.py tests/ops/test_residual.py \
  tests/ops/test_masked_conv.py tests/ops/test_step.py \
  -k "not reference and not triton and not operators and not compile and not archive and not file and not tensor_core"
unset CXX CXXFLAGS # torch compiles too
LD_PRELOAD=$preload exec "$python" -m pytest -q -x -p no:cacheprovider "$@"
