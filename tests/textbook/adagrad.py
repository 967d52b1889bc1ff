def states(c):
    return ["sum"]


def update(c, t, p, g, s):
    g = g + c["weight_decay"] * p
    total = s["sum"] + g**2
    step_size = float(c["lr"]) / (1 + (t - 1) * c["lr_decay"])
    return p - step_size * g / (total.sqrt() + c["eps"]), {"sum": total}
