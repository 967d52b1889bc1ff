"""Benchmarks: ``python -m bench``.

``workloads`` says what the optimizers run on, ``contenders`` who runs, ``bound`` what the memory
allows, ``measure`` how it is timed, ``report`` how it is told. ``instructions`` counts instructions
instead of time.
"""
