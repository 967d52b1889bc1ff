def states(c):
    return ["momentum_buffer"] * bool(c.get("momentum"))


def update(c, t, p, g, s):
    lr, momentum = float(c["lr"]), c["momentum"]
    g = g + c["weight_decay"] * p
    if not momentum:
        return p - lr * g, {}
    buf = s.get("momentum_buffer")
    buf = g if buf is None else momentum * buf + (1 - c["dampening"]) * g
    return p - lr * (g + momentum * buf if c["nesterov"] else buf), {"momentum_buffer": buf}
