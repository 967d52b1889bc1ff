"""The update rules in Triton: the same lines as in ``fastopt/rules``, in the same order.

``update`` takes blocks ``p`` and ``g`` in the type of the arithmetic (fp32 or fp64), its scalars
and its states, None for those that the settings do not call for. It returns a tuple of the new
``p`` and the new states. It knows nothing of memory, dtypes, masks or clipping: ``update.py`` does
those. Kernels are compiled without contraction to FMA.

``scalars`` is the function of the same name in ``fastopt/rules``, for hyperparameters and a step
that are known to the device alone.
"""

from . import adagrad, adam, assign, lion, rmsprop, sgd

RULES = {
    "assign": assign,
    "sgd": sgd,
    "lion": lion,
    "adagrad": adagrad,
    "rmsprop": rmsprop,
    "adam": adam,
}
