"""Builds fastvq._cpu, and fastvq._cuda where nvcc is found. Metadata is in pyproject.toml.

The extensions hold no torch header, so they build without torch and serve any version of it. A ninja file is
written and run: sources compile side by side, and an edited one recompiles alone. A source whose name ends in
_avx2, _avx512, _avx512_vnni or _amx is compiled for that instruction set, and only on x86-64; which one runs is decided
at run time. Those that the compiler does not have are left out.

FASTVQ_CUDA=0 leaves fastvq._cuda out, FASTVQ_CUDA=1 stops where there is no nvcc.

Tests and benchmarks have more, which no wheel holds: fastvq._cpu_testing (csrc/cpu/testing/*.cpp), built into editable
installs and with FASTVQ_TESTING=1; and with FASTVQ_EMULATED_TILES=1 the AMX kernels of fastvq._cpu on emulated tiles
(csrc/cpu/testing/emulated_tiles).
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
X86 = platform.machine().lower() in ("x86_64", "amd64")
# No contraction anywhere: exact scores are defined without fused multiply-add; filters ask for it by name.
CXXFLAGS = [
    "-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math", "-pthread", "-Wall", "-Wextra",
    "-Wno-psabi",  # vectors are passed between functions of one file only
]  # fmt: skip
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
# gcc takes its own headers of AVX-512 for reads of uninitialised variables.
AVX512_QUIET = [*AVX512, "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
VNNI = ["-mavx512vnni"]
AMX = ["-mamx-tile", "-mamx-bf16"]
ISA_FLAGS = {
    "avx2": AVX2,
    "avx512": AVX512_QUIET,
    "avx512_vnni": [*AVX512_QUIET, *VNNI],
    "amx": [*AVX512_QUIET, *AMX],
    "emulated": AVX512_QUIET,
}
# Instruction sets that a compiler may not have: the flag that tells the sources, its own, and a probe.
PROBES = {
    "avx512_vnni": ("-DFASTVQ_VNNI", [*AVX512, *VNNI], "auto f(__m512i v) { return _mm512_dpwssd_epi32(v, v, v); }"),
    "amx": ("-DFASTVQ_AMX", AMX, "void f() { _tile_zero(0); _tile_dpbf16ps(0, 1, 2); }"),
}

# The machine code that is made, of those that nvcc knows: an sm_80 runs on every 8.x, and so on. Nothing in the sources
# is written for one architecture alone, so all of it comes from one PTX, which newer cards compile when they load it.
OLDEST_GPU, GPUS = "80", ("80", "90", "100")
# No contraction, as above. Spills fail the build.
NVCCFLAGS = [
    "-std=c++17", "-O3", "-DNDEBUG", "--fmad=false", "-Werror", "all-warnings", "-Xptxas", "-warn-spills,-Werror",
    "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra",
]  # fmt: skip


def find_compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    sys.exit(
        "fastvq needs a C++17 compiler and found none (looked for $CXX, c++, g++, clang++); "
        "install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install)"
    )


def find_ninja() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            sys.exit("fastvq builds with ninja and found none; pip install ninja")
        return found


def compiles(compiler: str, flags: list[str], probe: str, work: Path) -> bool:
    """Whether the compiler, and the assembler behind it, make these instructions."""
    source = work / "probe.cpp"
    source.write_text(f"#include <immintrin.h>\n{probe}\n")
    command = [*compiler.split(), "-std=c++17", *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))]
    return subprocess.run(command, capture_output=True).returncode == 0


def switch(name: str, unset: str) -> str:
    """The value of an environment variable that is 0, 1 or unset; ``unset`` ends the sentence that refuses another."""
    wish = os.environ.get(name, "")
    if wish not in ("", "0", "1"):
        sys.exit(f"fastvq: {name}={wish!r}: expected 0 or 1, or unset it to {unset}")
    return wish


def find_nvcc() -> str | None:
    """nvcc of $CUDA_HOME or $CUDA_PATH, else of PATH, else of the usual place; FASTVQ_CUDA may forbid or demand it."""
    wish = switch("FASTVQ_CUDA", "build for CUDA where nvcc is found")
    if wish == "0":
        return None
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    named = [shutil.which("nvcc", path=str(Path(home) / "bin")) for home in homes]
    found = next(filter(None, [*named, shutil.which("nvcc"), shutil.which("nvcc", path="/usr/local/cuda/bin")]), None)
    if found is None and wish == "1":
        sys.exit(
            "fastvq: FASTVQ_CUDA=1 asks for the CUDA C++ kernels, and there is no nvcc in $CUDA_HOME/bin, "
            "$CUDA_PATH/bin, PATH or /usr/local/cuda/bin; install the CUDA toolkit, or unset FASTVQ_CUDA to do without"
        )
    return found


def gpu_targets(nvcc: str) -> list[str]:
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    known = [gpu for gpu in GPUS if f"sm_{gpu}" in listed]
    code = ",".join([*(f"sm_{gpu}" for gpu in known), f"compute_{OLDEST_GPU}"])
    return [
        "-gencode", f"arch=compute_{OLDEST_GPU},code=[{code}]",
        f"-DFASTVQ_ARCHITECTURES='\"{' '.join([*(f'sm_{gpu}' for gpu in known), f'compute_{OLDEST_GPU}'])}\"'",
    ]  # fmt: skip


def isa_of(source: Path) -> str | None:
    return next((isa for isa in ISA_FLAGS if source.stem.endswith("_" + isa)), None)


def escape(path: object) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class CleanBuild(build):
    """Empties the folder that a wheel is packed from: an earlier build may have left an extension or a module there."""

    def run(self) -> None:
        packed = Path(self.build_lib).resolve()
        if Path(self.build_base).resolve() in packed.parents:  # any other folder is of the caller's choice
            shutil.rmtree(packed, ignore_errors=True)
        super().run()


class NinjaBuild(build_ext):
    """Compiles all extensions with one ninja file instead of one compiler call after another."""

    def finalize_options(self) -> None:
        super().finalize_options()
        wish = switch("FASTVQ_TESTING", "build fastvq._cpu_testing in editable installs")
        if wish == "0" or (wish == "" and not self.in_source_tree()):
            self.extensions = [ext for ext in self.extensions if ext.name != TESTING]

    def in_source_tree(self) -> bool:
        return bool(self.inplace or getattr(self, "editable_mode", False))

    def build_extensions(self) -> None:
        compiler = find_compiler()  # before anything else that may be missing
        # An editable install is made again and again in one tree: what was compiled stays there, and pip's own folder,
        # another each time, is not used.
        kept = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        work = kept if self.in_source_tree() else Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        targets = {ext.name: Path(self.get_ext_fullpath(ext.name)).resolve() for ext in self.extensions}
        (work / "build.ninja").write_text("\n".join([*ninja_lines(compiler, self.extensions, targets, work), ""]))
        for name, target in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                subprocess.run([find_ninja(), "-C", str(work), str(target)], check=True)
            except subprocess.CalledProcessError:
                hint = "; set FASTVQ_CUDA=0 to install without the CUDA C++ kernels" if name == CUDA else ""
                sys.exit(f"fastvq: compiling {name} failed; the compiler's message is above{hint}")


def ninja_lines(compiler: str, extensions: list[Extension], targets: dict[str, Path], work: Path) -> list[str]:
    """The ninja file: every source once, and the extensions that link it."""
    import pybind11

    includes = [f'-I"{p}"' for p in (sysconfig.get_paths()["include"], pybind11.get_include())]
    flags = CXXFLAGS + os.environ.get("CXXFLAGS", "").split()
    left_out = set(ISA_FLAGS) if not X86 else {*PROBES, "emulated"}
    for isa, (define, isa_flags, probe) in PROBES.items() if X86 else ():
        if (isa != "amx" or sys.platform == "linux") and compiles(compiler, isa_flags, probe, work):
            left_out.remove(isa)
            flags.append(define)
    if X86 and switch("FASTVQ_EMULATED_TILES", "leave emulated tiles out") == "1":
        left_out.remove("emulated")
        flags.append("-DFASTVQ_EMULATED")
    shared = ["-shared", "-pthread"] + (["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [])
    shared += os.environ.get("LDFLAGS", "").split()
    nvcc = find_nvcc()
    gpu_flags = [*NVCCFLAGS, *gpu_targets(nvcc)] if nvcc else []
    lines = [
        f"cxx = {compiler}",
        f"nvcc = {nvcc}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule compile_gpu",
        "  command = $nvcc -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx $in {' '.join(shared)} -o $out",
        "rule link_gpu",  # nvcc knows where its libraries are
        "  command = $nvcc -shared -cudart static $in -o $out",
    ]
    compiled = {}
    for source in dict.fromkeys(Path(source) for ext in extensions for source in ext.sources):
        isa = isa_of(source)
        if isa in left_out:
            continue
        gpu = source.suffix == ".cu"
        own = gpu_flags if gpu else flags + ISA_FLAGS.get(isa or "", [])
        if source.stem.startswith("bind"):  # no other source sees Python
            own = own + includes
        compiled[source] = escape(work / source.relative_to("csrc").with_suffix(".o"))
        lines.append(f"build {compiled[source]}: {'compile_gpu' if gpu else 'compile'} {escape(ROOT / source)}")
        lines.append(f"  flags = {' '.join(own)}")
    for ext in extensions:
        objects = [compiled[Path(source)] for source in ext.sources if Path(source) in compiled]
        link = "link_gpu" if ext.name == CUDA else "link"
        lines.append(f"build {escape(targets[ext.name])}: {link} {' '.join(objects)}")
    return lines


def sources_of(*patterns: str) -> list[Path]:
    return [p.relative_to(ROOT) for pattern in patterns for p in sorted((ROOT / "csrc").glob(pattern))]


CUDA, TESTING = "fastvq._cuda", "fastvq._cpu_testing"
testing_sources = sources_of("cpu/testing/*.cpp")
cpu_sources = [source for source in sources_of("cpu/**/*.cpp") if source not in testing_sources]
sources = {
    "fastvq._cpu": [*sources_of("bind_cpu.cpp"), *cpu_sources],
    TESTING: [*sources_of("bind_cpu_testing.cpp"), *cpu_sources, *testing_sources],
}
if find_nvcc():
    sources[CUDA] = sources_of("bind_cuda.cpp", "cuda/*.cu")
setup(
    ext_modules=[Extension(name, [str(p) for p in of]) for name, of in sources.items()],
    cmdclass={"build": CleanBuild, "build_ext": NinjaBuild},
)
