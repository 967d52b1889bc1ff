"""Benchmarks: ``python -m bench``, on a CPU or a GPU; the method is in METHOD.md.

``workloads`` says what the optimizers run on, ``contenders`` and ``peers`` who runs, ``modes`` in
which precision, ``bound`` what the memory allows. ``turns`` and ``isolate`` have them take turns,
which ``measure`` times with ``clocks``; ``overhead`` is the host's time by the number of tensors,
``footprints`` the memory, ``startup`` a process's first step. ``records`` are the results, of which
``tables``, ``goals`` and ``compare`` tell.

Programs of their own are ``demo`` and ``trajectories`` (training runs), ``instructions`` (counted
instead of time), and ``kernels`` with ``offline`` and ``assembly`` (what Triton's compile to); what
changed of both tables is in ``history``. ``regression`` times what later versions are compared
with. ``plots``, ``page`` and ``scale`` are `plot`, `report` and `plan`.
"""
