"""Times that a later version is compared with: ``python -m pytest bench/regression``.

Each benchmark times, before every round, a reference that does the same work: the bare loop of
`bound`, or torch. Times of different runs do not compare on machines that others use too; the ratio
of the two does, and is in the ``extra_info`` of the saved results. To save and compare::

    python -m pytest bench/regression --benchmark-storage=bench/regression/baselines \\
        --benchmark-save=NAME
    python -m bench.regression compare OLD.json NEW.json    # ratios to the references
    pytest-benchmark compare OLD.json NEW.json              # raw times: of one machine, left alone
"""
