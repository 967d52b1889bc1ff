"""``python -m fastopt``: what works on this machine."""

import argparse
import platform

import torch

import fastopt


def main() -> None:
    argparse.ArgumentParser(prog="python -m fastopt", description=__doc__).parse_args()
    print(
        f"fastopt {fastopt.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    )
    for name, backend in fastopt.backends().items():
        print(f"{name:10} {'yes' if backend.available else 'no ':4} {backend.detail}")


if __name__ == "__main__":
    main()
