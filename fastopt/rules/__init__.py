"""The update rules, in order of increasing complexity, and the optimizers made from them.

One file a rule, under the same name here, in ``csrc/rules`` and in ``kernels/rules``. This one has
the specification, its scalars, its row of the table and its optimizer classes; the others have
nothing but the update. The rules are pure: no memory, dtypes, threads or clipping. They use only
``+ - * /``, comparisons and `sqrt`, all of them correctly rounded, in the order in which every
backend computes them: torch's fused spellings (``add(alpha=)``, ``addcmul``, ``addcdiv``, ``lerp``)
may contract to FMA.
"""

from ..optimizer import Optimizer
from .adagrad import Adagrad
from .adam import Adam, AdamW
from .lion import Lion
from .rmsprop import RMSprop
from .sgd import SGD

#: The table that tests and benchmarks iterate over.
OPTIMIZERS: tuple[type[Optimizer], ...] = (SGD, Lion, Adagrad, RMSprop, Adam, AdamW)
RULES = {cls.rule.name: cls.rule for cls in OPTIMIZERS}

__all__ = ["OPTIMIZERS", "SGD", "Adagrad", "Adam", "AdamW", "Lion", "RMSprop"]
