"""Those whom fastopt is compared with: torch's own optimizers, and other packages where installed.

Each is asked for the same work: the rule with torch's defaults, whatever the package's own are, at
the same learning rate. Where a package cannot, or says that it does and does not, it is refused for
that reason; where it does less or more by design, its docstring tells.
"""

import importlib
import importlib.util
import inspect
import os
import shutil
from collections.abc import Mapping
from math import inf
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from .contenders import LR, MAX_NORM, ClipsApart, Contender, Rule, UnavailableError

HALVES = (torch.bfloat16, torch.float16)
#: Of arithmetic in fp16, in which Adam's eps is 0 and so are small squares, come infinities.
NOT_FP16 = (torch.float32, torch.bfloat16)
FLOATS = (torch.float32, *HALVES)
CXX = "g++"  # what torch's compiler and DeepSpeed's build call
MOST_COMPILED = 250  # tensors in one graph: for 300, torch.compile takes 150 s on 2 cores


class Peer(ClipsApart):
    """Somebody else's optimizer."""

    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    dtypes: ClassVar[tuple[torch.dtype, ...]] = FLOATS
    #: Whether its first step compiles something, which takes up to minutes.
    compiles: ClassVar[bool] = False
    #: More it would compile for longer than anybody waits.
    most_tensors: ClassVar[float] = inf

    def __init__(self, rule: Rule, params: list[Tensor]) -> None:
        param = params[0]
        if reason := availability(type(self), param.device.type):
            raise UnavailableError(reason)
        if param.dtype not in self.dtypes:
            raise UnavailableError(f"{self.name} is not for {param.dtype} parameters")
        if len(params) > self.most_tensors:
            raise UnavailableError(f"{self.name} compiles {len(params)} tensors for too long")
        super().__init__(rule, params)

    @classmethod
    def missing(cls) -> str:
        """That it is not installed, else empty."""
        return ""


def availability(kind: type[Contender], device: str = "cpu") -> str:
    """Why a contender cannot run on a device, empty if it seems to be able: nothing is imported."""
    if not issubclass(kind, Peer):
        return ""
    if reason := kind.missing():
        return reason
    if device not in kind.devices:
        return f"{kind.name} needs {'parameters on the CPU' if device == 'cuda' else 'a GPU'}"
    if kind.compiles and device == "cpu" and not shutil.which(CXX):
        return f"{kind.name} compiles with {CXX}, which is not installed"
    return ""


class Torch(Peer):
    """torch.optim's class of the same name, with one implementation chosen."""

    implementation: ClassVar[Mapping[str, bool]]

    def build(self, rule: Rule) -> Optimizer:
        peer = getattr(torch.optim, rule.title, None)
        if peer is None or not inspect.signature(peer).parameters.keys() >= {*self.implementation}:
            raise UnavailableError(f"there is no {self.name} {rule.title}")
        optimizer: Optimizer = peer(self.params, lr=LR, **self.implementation, **rule.flags)
        return optimizer


class TorchFused(Torch):
    name = "torch fused"
    implementation = MappingProxyType({"fused": True})

    def build(self, rule: Rule) -> Optimizer:
        param = self.params[0]
        if rule.title == "SGD" and param.dtype in HALVES and not param.is_cuda:
            raise UnavailableError(
                f"torch's fused SGD updates no full SIMD block of {param.dtype} parameters on a CPU"
            )
        return super().build(rule)


class TorchForeach(Torch):
    name = "torch foreach"
    implementation = MappingProxyType({"foreach": True})
    dtypes = NOT_FP16


class TorchForLoop(Torch):
    name = "torch for-loop"
    implementation = MappingProxyType({"foreach": False})
    dtypes = NOT_FP16


class TorchCompile(TorchForeach):
    """The foreach step compiled, which compiles faster than the for-loop.

    Its learning rate stays a number, as with all others: the step would be compiled again for a new
    one, but here that never comes.
    """

    name = "torch.compile"
    own_process = True  # the compiler has workers of its own, and hooks into the interpreter
    compiles = True
    most_tensors = MOST_COMPILED

    def build(self, rule: Rule) -> Optimizer:
        optimizer = super().build(rule)
        optimizer.step = torch.compile(optimizer.step)
        return optimizer


class MastersByHand(Peer):
    """What users write around torch's fused optimizer for parameters of 16 bits."""

    name = "torch fused, masters by hand"
    dtypes = HALVES
    adds = "+fp32 master"

    def build(self, rule: Rule) -> Optimizer:
        self.masters = [param.detach().float().requires_grad_() for param in self.params]
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        return TorchFused(rule, self.masters).optimizer

    @torch.no_grad()
    def run(self) -> None:
        torch._foreach_copy_([m.grad for m in self.masters], [p.grad for p in self.params])
        if self.clip:
            clip_grad_norm_(self.masters, MAX_NORM)
        self.optimizer.step()
        torch._foreach_copy_(self.params, self.masters)


#: torch's defaults that some packages do not share, by the rule's title.
DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "Adam": {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
        "AdamW": {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    }
)


class Class(NamedTuple):
    """What a package has for a rule."""

    name: str
    #: The rule's flags that it heeds: some constructors take any, and the steps do without.
    flags: tuple[str, ...] = ()
    settings: Mapping[str, Any] = MappingProxyType({})


class Package(Peer):
    """Another package's optimizer, where that is installed."""

    package: ClassVar[str]  # what pip calls it
    module: ClassVar[str]
    classes: ClassVar[Mapping[str, Class]]  # by the rule's title

    @classmethod
    def missing(cls) -> str:
        found = importlib.util.find_spec(cls.module.partition(".")[0])
        return "" if found else f"{cls.package} is not installed"

    def build(self, rule: Rule) -> Optimizer:
        if rule.title not in self.classes:
            raise UnavailableError(f"{self.name} has no {rule.title}")
        name, flags, settings = self.classes[rule.title]
        if unknown := [flag for flag in rule.flags if flag not in flags]:
            raise UnavailableError(f"{self.name} has no {rule.title} with {', '.join(unknown)}")
        try:
            kind = getattr(importlib.import_module(self.module), name)
        except (ImportError, AttributeError) as error:
            raise UnavailableError(str(error)) from None
        settings = {**DEFAULTS.get(rule.title, {}), **settings, **self.more_settings()}
        optimizer: Optimizer = kind(self.params, lr=LR, **settings, **rule.flags)
        return optimizer

    def more_settings(self) -> dict[str, Any]:
        """What it has to be told about these parameters."""
        return {}


class DeepSpeedCPUAdam(Package):
    """Its states are fp32, whatever the parameters are. The first of all builds it: minutes."""

    name = "DeepSpeed CPUAdam"
    package = "deepspeed"
    module = "deepspeed.ops.adam"
    classes = MappingProxyType(
        {
            "Adam": Class("DeepSpeedCPUAdam", settings={"adamw_mode": False}),
            "AdamW": Class("DeepSpeedCPUAdam", settings={"adamw_mode": True}),
        }
    )
    devices = ("cpu",)
    compiles = True
    own_process = True  # it is built for this very processor, and may fail on it
    adds_to_halves = "+fp32 states"

    def build(self, rule: Rule) -> Optimizer:
        # Otherwise it looks for a GPU, and says on the standard output that there is none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return super().build(rule)


class BitsAndBytes(Package):
    """Its states are fp32, whatever the parameters are.

    Its SGD takes and ignores nesterov and dampening, its RMSprop momentum, its Adam amsgrad.
    """

    name = "bitsandbytes"
    adds_to_halves = "+fp32 states"
    package = "bitsandbytes"
    module = "bitsandbytes.optim"
    classes = MappingProxyType(
        {
            "SGD": Class("SGD", ("momentum",)),
            "Adagrad": Class("Adagrad"),
            "RMSprop": Class("RMSprop"),
            "Adam": Class("Adam"),
            "AdamW": Class("AdamW"),
        }
    )


class BitsAndBytes8Bit(BitsAndBytes):
    """States of tensors below 4096 elements stay fp32."""

    name = "bitsandbytes 8-bit"
    adds_to_halves = ""
    classes = MappingProxyType(
        {
            title: found._replace(name=f"{found.name}8bit")
            for title, found in BitsAndBytes.classes.items()
        }
    )
    adds = "+8bit"
    slow = True


class TorchAO(Package):
    """States of tensors below 4096 elements stay in the parameter's dtype, and those of a number of
    elements that is no multiple of 256. Each shape is compiled by itself.

    Its constructors take amsgrad, which its compiled step fails on.
    """

    name = "torchao 8-bit"
    package = "torchao"
    module = "torchao.optim"
    classes = MappingProxyType({"Adam": Class("Adam8bit"), "AdamW": Class("AdamW8bit")})
    adds = "+8bit"
    own_process = True
    compiles = True
    slow = True


class Optimi(Package):
    """Parameters of 16 bits get states of 16 bits and a Kahan sum's compensation.

    Its SGD's dampening is another: always that of an average.
    """

    name = "optimi"
    adds_to_halves = "+kahan"
    package = "torch-optimi"
    module = "optimi"
    classes = MappingProxyType(
        {"SGD": Class("SGD", ("momentum",)), "Adam": Class("Adam"), "AdamW": Class("AdamW")}
    )


class FlashOptim(Package):
    """Parameters of 16 bits get 8 more bits of a master."""

    name = "flashoptim"
    package = "flashoptim"
    module = "flashoptim"
    classes = MappingProxyType(
        {
            "SGD": Class("FlashSGD", ("momentum", "nesterov", "dampening")),
            "Adam": Class("FlashAdam"),
            "AdamW": Class("FlashAdamW"),
        }
    )
    adds = "+8bit"
    devices = ("cuda",)

    def more_settings(self) -> dict[str, Any]:
        # Its default, 24 bits, is an error where there is nothing to be saved.
        return {"master_weight_bits": None} if self.params[0].dtype == torch.float32 else {}


class Apex(Package):
    name = "apex"
    package = "NVIDIA's apex"
    module = "apex.optimizers"
    classes = MappingProxyType(
        {
            "SGD": Class("FusedSGD", ("momentum", "nesterov", "dampening")),
            "Adagrad": Class("FusedAdagrad"),
            "Adam": Class("FusedAdam", settings={"adam_w_mode": False}),
            "AdamW": Class("FusedAdam", settings={"adam_w_mode": True}),
        }
    )
    devices = ("cuda",)


class HeavyBall(Package):
    """Its states are fp32; parameters of 16 bits are rounded at random."""

    name = "heavyball"
    adds_to_halves = "+stochastic"
    package = "heavyball"
    module = "heavyball"
    # By default a step drops the gradients, and the next one finds nothing to do.
    classes = MappingProxyType(
        dict.fromkeys(("Adam", "AdamW"), Class("AdamW", settings={"consume_grad": False}))
    )
    own_process = True
    compiles = True
    most_tensors = MOST_COMPILED


#: In the order of the columns.
PEERS: tuple[type[Peer], ...] = (
    *(TorchFused, TorchForeach, TorchForLoop, TorchCompile, MastersByHand),
    *(DeepSpeedCPUAdam, BitsAndBytes, BitsAndBytes8Bit, TorchAO),
    *(Optimi, FlashOptim, Apex, HeavyBall),
)
