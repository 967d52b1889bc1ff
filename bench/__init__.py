"""Benchmarks: ``python -m bench`` on a CPU, ``python -m bench.gpu`` on a GPU.

Of the precision modes, which ``modes`` lists, ``python -m bench.precision`` measures the speed on a
CPU, ``bench.memory`` the memory, and ``bench.trajectories`` what they do to a training run.

``workloads`` says what the optimizers run on, ``contenders`` who runs, ``bound`` what the memory
allows, ``clocks`` and ``measure`` how it is timed, ``report`` how it is told; for a GPU,
``gpu_report`` and ``gpu_picture`` are. ``overhead`` is the host's time by the number of tensors,
``startup`` that of a process's first step. ``instructions`` counts instructions instead of time,
and ``kernels`` (with ``offline`` and ``assembly``) those that the Triton kernels compile to; what
changed of both is in ``history``. ``regression`` times what a later version is compared with.
"""
