"""Lion, as in algorithm 2 of Chen et al. 2023."""

import torch


def sign(x):
    return torch.where(x.isnan(), x, x.sign())


def states(c):
    return ["exp_avg"]


def update(c, t, p, g, s):
    lr, (beta1, beta2) = float(c["lr"]), c["betas"]
    direction = sign(beta1 * s["exp_avg"] + (1 - beta1) * g)
    exp_avg = beta2 * s["exp_avg"] + (1 - beta2) * g
    return p - lr * (direction + c["weight_decay"] * p), {"exp_avg": exp_avg}


class Lion(torch.optim.Optimizer):
    def __init__(
        self,
        params,
        lr=1e-4,
        betas=(0.9, 0.99),
        weight_decay=0,
        *,
        maximize=False,
        foreach=None,
        capturable=False,
        differentiable=False,
        fused=None,
    ):
        settings = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        flags = {"foreach": foreach, "capturable": capturable, "fused": fused}
        super().__init__(params, settings | flags | {"differentiable": differentiable})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = -p.grad if group["maximize"] else p.grad
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                exp_avg = state["exp_avg"]
                direction = sign(beta1 * exp_avg + (1 - beta1) * g)
                p.mul_(1 - lr * group["weight_decay"]).sub_(lr * direction)
                exp_avg.mul_(beta2).add_((1 - beta2) * g)
        return loss
