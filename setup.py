import sys
from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

# -ffp-contract=off: the same bits on every instruction set. -fno-trapping-math changes no value; it
# lets the compiler turn a rule's conditions into selects. -Wno-psabi: no function takes vectors,
# once all is inlined.
openmp = ["-fopenmp"] if sys.platform == "linux" else []
setup(
    ext_modules=[
        Pybind11Extension(
            "fastopt._C",
            sources=sorted(glob("csrc/*.cpp")),
            depends=[*glob("csrc/*.h"), *glob("csrc/rules/*.h")],
            cxx_std=17,
            extra_compile_args=[
                *("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
                "-Wno-psabi",
                *openmp,
            ],
            extra_link_args=openmp,
        )
    ]
)
