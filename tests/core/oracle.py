"""The method again, from its formulas, in Python floats and loops. Shares nothing with the product.

A vector is a list, a matrix a list of rows. -inf marks an excluded id.
"""

import math

INF = math.inf


# --- distributions -------------------------------------------------------------------------------------


def softmax(logits, temperature=1.0):
    top = max(logits)
    weights = [math.exp((z - top) / temperature) if z > -INF else 0.0 for z in logits]
    total = math.fsum(weights)
    return [w / total for w in weights]


def cross_entropy(logits, label):
    top = max(logits)
    return top + math.log(math.fsum(math.exp(z - top) for z in logits)) - logits[label]


def kl(p, q):
    total = 0.0
    for a, b in zip(p, q, strict=True):
        if a > 0:
            total += a * math.log(a / b) if b > 0 else INF
    return total


def mix(p, q, share):
    return [share * a + (1 - share) * b for a, b in zip(p, q, strict=True)]


def gaps(p, q, head_mass):
    """Sum of |p - q| over the teacher's head and over its tail."""
    head, mass, last = set(), 0.0, None
    for i in sorted(range(len(p)), key=lambda i: -p[i]):
        if mass >= head_mass and p[i] != last:
            break
        head.add(i)
        mass += p[i]
        last = p[i]
    in_head = sum(abs(p[i] - q[i]) for i in range(len(p)) if i in head)
    in_tail = sum(abs(p[i] - q[i]) for i in range(len(p)) if i not in head)
    return in_head, in_tail


def adaptive(p, q, head_mass=0.5, frozen_q=None):
    """frozen_q: the student that sets the weights; they are constants of the derivative."""
    in_head, in_tail = gaps(p, q if frozen_q is None else frozen_q, head_mass)
    share = in_head / (in_head + in_tail) if in_head + in_tail > 0 else 0.5
    return share * kl(p, q) + (1 - share) * kl(q, p)


# p teacher, q student
DISTANCES = {
    "forward_kl": lambda p, q: kl(p, q),
    "reverse_kl": lambda p, q: kl(q, p),
    "js": lambda p, q, teacher_share=0.5: (
        teacher_share * kl(p, mix(p, q, teacher_share)) + (1 - teacher_share) * kl(q, mix(p, q, teacher_share))
    ),
    "skewed_forward_kl": lambda p, q, skew=0.1: kl(p, mix(p, q, skew)),
    "skewed_reverse_kl": lambda p, q, skew=0.1: kl(q, mix(q, p, skew)),
    "adaptive_kl": adaptive,
    "tvd": lambda p, q: 0.5 * sum(abs(a - b) for a, b in zip(p, q, strict=True)),
}


# --- models --------------------------------------------------------------------------------------------


def row_times_matrix(row, matrix):
    return [math.fsum(row[i] * matrix[i][j] for i in range(len(row))) for j in range(len(matrix[0]))]


def logits(hidden, head):
    """head: dict of weight [V][D], bias [V] or None, scale, softcap."""
    out = []
    for v, weights in enumerate(head["weight"]):
        z = math.fsum(h * w for h, w in zip(hidden, weights, strict=True))
        if head["bias"] is not None:
            z += head["bias"][v]
        z *= head["scale"]
        if head["softcap"] is not None:
            z = head["softcap"] * math.tanh(z / head["softcap"])
        out.append(z)
    return out


def argmax(values):
    return max(range(len(values)), key=lambda i: (values[i], -i))


# --- objective -----------------------------------------------------------------------------------------


def agrees(case, n):
    """Whether the projected teacher of pair n predicts its label, over the student's real ids."""
    projected = logits(row_times_matrix(case["teacher"][n], case["t2s"]), case["head"])
    return argmax(projected[: case["ids"]]) == case["label"][n]


def terms(case, live):
    """Sum and count of each term.

    case: everything as given. live: the values that are differentiated: student, weight, bias, t2s. Each term
    takes from `live` only what its gradient may reach and everything else from `case`.
    """
    live_head = {**case["head"], "weight": live["weight"], "bias": live["bias"]}
    distance, tau = case["distance"], case["temperature"]
    out = {name: [0.0, 0] for name in ("ce", "t2s_kd", "t2s_ce", "s2t_kd", "t2s_agreement", "s2t_agreement")}

    def add(name, value):
        out[name][0] += value
        out[name][1] += 1

    for r, gold in enumerate(case["gold"]):
        add("ce", cross_entropy(logits(live["student"][r], live_head), gold))
    for n in range(len(case["teacher"])):
        if case["label"][n] >= 0:
            moving = logits(row_times_matrix(case["teacher"][n], live["t2s"]), case["head"])
            add("t2s_ce", cross_entropy(moving, case["label"][n]))
            agree = agrees(case, n)
            add("t2s_agreement", float(agree))
            if agree or not case["agreement_mask"]:
                fixed = logits(row_times_matrix(case["teacher"][n], case["t2s"]), case["head"])
                p = softmax(fixed[: case["ids"]], tau)
                q = softmax(logits(live["student"][n], live_head)[: case["ids"]], tau)
                frozen = softmax(logits(case["student"][n], case["head"])[: case["ids"]], tau)
                add("t2s_kd", _distance(distance, p, q, frozen))
        if case["s2t_rows"][n]:
            real = case["teacher_ids"]
            p = softmax(logits(case["teacher"][n], case["teacher_head"])[:real], tau)
            seen = logits(row_times_matrix(live["student"][n], case["s2t"]), case["teacher_head"])[:real]
            start = logits(row_times_matrix(case["student"][n], case["s2t"]), case["teacher_head"])[:real]
            add("s2t_kd", _distance(distance, p, softmax(seen, tau), softmax(start, tau)))
            full = logits(case["teacher"][n], case["teacher_head"])[:real]
            add("s2t_agreement", float(argmax(seen) == argmax(full)))
    return out


def _distance(name, p, q, frozen):
    if name == "adaptive_kl":
        return adaptive(p, q, frozen_q=frozen)
    return DISTANCES[name](p, q)


def loss(case, live):
    """The objective's scalar with each term divided by its divisor."""
    found, r, div = terms(case, live), case["kd_ratio"], case["divisors"]
    wanted = {"both": ("t2s_kd", "t2s_ce", "s2t_kd"), "student": ("t2s_kd", "t2s_ce"), "teacher": ("s2t_kd",)}
    total = (1 - r) * found["ce"][0] / div["ce"] if div["ce"] else 0.0
    for name in wanted[case["spaces"]]:
        if div[name]:
            total += r * found[name][0] / div[name]
    return total


def gradient(function, live, name, step=1e-5):
    """Central differences of function(live) by every entry of live[name]; nested lists like live[name]."""

    def by_entry(values):
        if isinstance(values, list):
            if values and isinstance(values[0], list):
                return [by_entry(row) for row in values]
            out = []
            for i, middle in enumerate(values):
                values[i] = middle + step
                above = function(live)
                values[i] = middle - step
                below = function(live)
                values[i] = middle
                out.append((above - below) / (2 * step))
            return out
        raise TypeError(type(values))

    return by_entry(live[name])
