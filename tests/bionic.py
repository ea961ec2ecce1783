"""A sysroot as an Android NDK has one, of what our sources need: declarations (cpp/bionic), start files, and libraries of symbols without code.

Names and signatures are those of bionic at API level 24 (Android 7.0), as far as our sources need them; what is missing there must not be used.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tools import lack

from qcompiler.backend.toolchain import _clang
from qcompiler.base.targets import Target

LIBRARIES = {
    "libc.so": """__errno __cxa_atexit __cxa_finalize __libc_init __stack_chk_fail abort calloc clock_gettime exit fclose fopen fprintf fread free fscanf
        ferror fflush fputs getauxval getpid kill malloc memcmp memcpy memmove memset mmap munmap pthread_create pthread_getspecific pthread_join
        pthread_key_create pthread_key_delete pthread_mutex_lock pthread_mutex_unlock pthread_setspecific pthread_sigmask sched_yield snprintf sysconf
        sigaddset sigemptyset sigfillset sigprocmask sigtimedwait sscanf strchr strcmp strerror strlen strncmp strtol syscall vsnprintf waitpid fork _exit
        prctl nanosleep usleep realloc printf puts putchar fputc fwrite strtod atoi atof qsort strrchr uname gethostname alarm signal sigaction fgets strstr
        strncpy strcpy strcspn setvbuf getenv posix_memalign""",
    "libm.so": """acos acosf acosh acoshf asin asinf asinh asinhf atan atan2 atan2f atanf atanh atanhf ceil ceilf cos cosf cosh coshf erf erff exp exp2 exp2f
        expf expm1 expm1f fabs fabsf floor floorf fma fmaf fmax fmaxf fmin fminf fmod fmodf ldexp ldexpf log log10 log10f log1p log1pf log2 log2f logf nearbyint
        nearbyintf pow powf rint rintf round roundf sin sinf sinh sinhf sqrt sqrtf tan tanf tanh tanhf trunc truncf""",
    "libdl.so": "dlopen dlclose dlsym dlerror",
}
OBJECTS = ("stdin", "stdout", "stderr")
OF_ARM = [f"__aeabi_mem{what}{alignment}" for what in ("cpy", "move", "set", "clr") for alignment in ("", "4", "8")]


@dataclass(frozen=True)
class Sysroot:
    """A folder for QCOMPILER_ANDROID_SYSROOT, and what its libraries define."""

    folder: Path
    clang: str

    def wanted(self, target: Target) -> set[str]:
        """The symbols that a library for `target` may leave to Android."""
        functions = {s for names in LIBRARIES.values() for s in names.split()}
        return functions | {*OBJECTS} | set(OF_ARM if target.architecture == "armv7a" else ())


def require_clang() -> str:
    """A clang that links with lld."""
    clang = _clang(os.environ.get("PATH", ""))
    lack("libraries for Android", [] if clang else ["clang-19", "lld-19"])
    assert clang is not None
    return clang


def make_sysroot(folder: Path, targets: list[Target]) -> Sysroot:
    clang = require_clang()
    shutil.copytree(Path(__file__).parent / "cpp" / "bionic", folder / "usr" / "include")
    shutil.copy(Path(__file__).parent / "cpp" / "jni" / "jni.h", folder / "usr" / "include")
    for target in targets:
        triple = target.compiler[0].removesuffix("-clang")
        there = folder / "usr" / "lib" / {"aarch64": "aarch64-linux-android", "armv7a": "arm-linux-androideabi"}[target.architecture] / "24"
        there.mkdir(parents=True)

        def make(text: str, *words: str, triple: str = triple, there: Path = there) -> None:
            command = [clang, f"--target={triple}", "-nostdlib", "-fuse-ld=lld", "-fno-builtin", "-w", "-x", "c", "-", *words]
            subprocess.run(command, input=text, text=True, check=True, cwd=there)

        for name, symbols in LIBRARIES.items():
            own = OF_ARM if name == "libc.so" and target.architecture == "armv7a" else []
            text = [*(f"void {s}(void) {{}}" for s in [*symbols.split(), *own]), *(f"char* {s};" for s in OBJECTS if name == "libc.so")]
            make("\n".join(text), "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", name)
        for name in ("crtbegin_so.o", "crtend_so.o", "crtend_android.o"):
            make("", "-c", "-o", name)
        start = "int main(); void __libc_init(); void _start(void) { __libc_init(0, 0, main, 0); }"
        make(start, "-fPIC", "-c", "-o", "crtbegin_dynamic.o")
    return Sysroot(folder, clang)
