def states(c):
    centered, momentum = bool(c.get("centered")), bool(c.get("momentum"))
    return ["square_avg", *["grad_avg"] * centered, *["momentum_buffer"] * momentum]


def update(c, t, p, g, s):
    alpha = c["alpha"]
    g = g + c["weight_decay"] * p
    square = alpha * s["square_avg"] + (1 - alpha) * g**2
    new, variance = {"square_avg": square}, square
    if c["centered"]:
        new["grad_avg"] = alpha * s["grad_avg"] + (1 - alpha) * g
        variance = (square - new["grad_avg"] ** 2).clamp(min=0)
    direction = g / (variance.sqrt() + c["eps"])
    if c["momentum"]:
        direction = new["momentum_buffer"] = c["momentum"] * s["momentum_buffer"] + direction
    return p - float(c["lr"]) * direction, new
