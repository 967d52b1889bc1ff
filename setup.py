import os
import re
import shlex
import shutil
import sys
import sysconfig
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

RULES = """\
rule compile
  command = $words -MD -MF $out.d
  depfile = $out.d
  deps = gcc
rule link
  command = $words
"""


def escaped(path):
    return re.sub(r"[$ :]", r"$\g<0>", path)


class NinjaBuild(build_ext):
    """setuptools names the commands; ninja, where there is one, runs those that are due."""

    def finalize_options(self):
        super().finalize_options()
        self.force = True  # all commands are to be named, each time
        if getattr(self, "editable_mode", False):  # else in a folder that setuptools drops
            self.build_temp = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"

    def build_extensions(self):
        folders = [sysconfig.get_path("scripts"), *os.get_exec_path()]  # activated or not
        ninja = shutil.which("ninja", path=os.pathsep.join(folders))
        if ninja is None:
            return super().build_extensions()
        commands, objects = [], []
        self.compiler.spawn = self.compiler.call = commands.append  # the old and the new name
        super().build_extensions()
        lines = [f"builddir = {escaped(self.build_temp)}", RULES]
        for words in commands:
            output = escaped(words[words.index("-o") + 1])
            if "-c" in words:
                lines.append(f"build {output}: compile {escaped(words[words.index('-c') + 1])}")
                objects.append(output)
            else:
                lines.append(f"build {output}: link {' '.join(objects)}")
            lines.append("  words = " + shlex.join(words).replace("$", "$$"))
        plan = Path(self.build_temp, "build.ninja")
        plan.write_text("\n".join(lines) + "\n")
        jobs = ["-j", str(self.parallel)] if self.parallel else []
        self.spawn([ninja, "--verbose" if self.verbose else "--quiet", *jobs, "-f", str(plan)])


# -ffp-contract=off: the same bits on every instruction set. -fno-trapping-math changes no value; it
# lets the compiler turn a rule's conditions into selects. -Wno-psabi: no function takes vectors,
# once all is inlined.
openmp = ["-fopenmp"] if sys.platform == "linux" else []
setup(
    cmdclass={"build_ext": NinjaBuild},
    ext_modules=[
        Pybind11Extension(
            "fastopt._C",
            sources=sorted(glob("csrc/*.cpp")),
            cxx_std=17,
            extra_compile_args=[
                *("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
                "-Wno-psabi",
                *openmp,
            ],
            extra_link_args=openmp,
        )
    ],
)
