import torch


def states(c):
    return ["exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * bool(c.get("amsgrad"))]


def update(c, t, p, g, s):
    lr, (beta1, beta2) = float(c["lr"]), c["betas"]
    if c["decoupled_weight_decay"]:
        p = p - lr * c["weight_decay"] * p
    else:
        g = g + c["weight_decay"] * p
    new = {
        "exp_avg": beta1 * s["exp_avg"] + (1 - beta1) * g,
        "exp_avg_sq": beta2 * s["exp_avg_sq"] + (1 - beta2) * g**2,
    }
    second = new["exp_avg_sq"]
    if c["amsgrad"]:
        second = new["max_exp_avg_sq"] = torch.maximum(s["max_exp_avg_sq"], second)
    denom = (second / (1 - beta2**t)).sqrt() + c["eps"]
    return p - lr * new["exp_avg"] / (1 - beta1**t) / denom, new
