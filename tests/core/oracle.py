"""The method again, from its formulas, in Python floats and loops. Shares nothing with the product.

A vector is a list, a matrix a list of rows. -inf marks an excluded id.
"""

import decimal
import math
from decimal import Decimal

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


def moving_head(case, live):
    """The student's head with the weights that are differentiated."""
    return {**case["head"], "weight": live["weight"], "bias": live["bias"]}


def argmax(values):
    return max(range(len(values)), key=lambda i: (values[i], -i))


# --- objective -----------------------------------------------------------------------------------------


class Sums(dict):
    """Sum and count of each term and rate of two spaces."""

    def __init__(self):
        names = ("ce", "t2s_kd", "t2s_ce", "s2t_kd", "t2s_agreement", "s2t_agreement")
        super().__init__({name: [0.0, 0] for name in names})

    def add(self, name, value):
        self[name][0] += value
        self[name][1] += 1


def agrees(case, n):
    """Whether the projected teacher of pair n predicts its label, over the student's real ids."""
    projected = logits(row_times_matrix(case["teacher"][n], case["t2s"]), case["head"])
    return argmax(projected[: case["ids"]]) == case["label"][n]


def terms(case, live):
    """Sum and count of each term.

    case: everything as given. live: the values that are differentiated: student, weight, bias, t2s. Each term
    takes from `live` only what its gradient may reach and everything else from `case`.
    """
    live_head = moving_head(case, live)
    distance, tau = case["distance"], case["temperature"]
    out = Sums()
    for r, gold in enumerate(case["gold"]):
        out.add("ce", cross_entropy(logits(live["student"][r], live_head), gold))
    for n in range(len(case["teacher"])):
        if case["label"][n] >= 0:
            moving = logits(row_times_matrix(case["teacher"][n], live["t2s"]), case["head"])
            if case["image"]:
                known = logits(case["teacher"][n], case["teacher_head"])[: case["teacher_ids"]]
                out.add("t2s_ce", compare_mapped(moving[: case["ids"]], known, 1.0, case["image"]))
            else:
                out.add("t2s_ce", cross_entropy(moving, case["label"][n]))
            agree = agrees(case, n)
            out.add("t2s_agreement", float(agree))
            if agree or not case["agreement_mask"]:
                fixed = logits(row_times_matrix(case["teacher"][n], case["t2s"]), case["head"])
                p = softmax(fixed[: case["ids"]], tau)
                q = softmax(logits(live["student"][n], live_head)[: case["ids"]], tau)
                frozen = softmax(logits(case["student"][n], case["head"])[: case["ids"]], tau)
                out.add("t2s_kd", distance_of(distance, p, q, frozen))
        if case["s2t_rows"][n]:
            real = case["teacher_ids"]
            p = softmax(logits(case["teacher"][n], case["teacher_head"])[:real], tau)
            seen = logits(row_times_matrix(live["student"][n], case["s2t"]), case["teacher_head"])[:real]
            start = logits(row_times_matrix(case["student"][n], case["s2t"]), case["teacher_head"])[:real]
            out.add("s2t_kd", distance_of(distance, p, softmax(seen, tau), softmax(start, tau)))
            full = logits(case["teacher"][n], case["teacher_head"])[:real]
            out.add("s2t_agreement", float(argmax(seen) == argmax(full)))
    return out


def distance_of(name, p, q, frozen):
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


# --- other methods -------------------------------------------------------------------------------------


def compare_vanilla(z_s, z_t, tau, kind):
    return DISTANCES[kind](softmax(z_t, tau), softmax(z_s, tau))


def compare_overlap(z_s, z_t, tau, kind, pairs):
    """pairs: (student id, teacher id). Probabilities first, then each divided by what the shared ids have."""
    q, p = softmax(z_s, tau), softmax(z_t, tau)
    shared_q, shared_p = math.fsum(q[i] for i, _ in pairs), math.fsum(p[j] for _, j in pairs)
    return DISTANCES[kind]([p[j] / shared_p for _, j in pairs], [q[i] / shared_q for i, _ in pairs])


def compare_uld(z_s, z_t, tau):
    q, p = sorted(softmax(z_s, tau)), sorted(softmax(z_t, tau))
    total = 0.0
    while p or q:
        total += abs((p.pop() if p else 0.0) - (q.pop() if q else 0.0))
    return total


def compare_mapped(z_s, z_t, tau, image):
    p, q = softmax(z_t, tau), softmax(z_s, tau)
    kept = math.fsum(a for a, i in zip(p, image, strict=True) if i >= 0)
    total = 0.0
    for i, b in enumerate(q):
        a = math.fsum(a for a, j in zip(p, image, strict=True) if j == i) / kept
        if a > 0:
            total += a * math.log(a / b)
    return total


def baseline_loss(case, live, compare, share_of_ce, share_of_kd):
    """ce over the rows of case["ce_rows"] and compare(student logits, teacher logits) over the pairs."""
    head = moving_head(case, live)
    total = 0.0
    for r, gold in enumerate(case["gold"]):
        if case["ce_rows"][r]:
            total += share_of_ce * cross_entropy(logits(live["student"][r], head), gold)
    for n, teacher in enumerate(case["teacher"]):
        z_s = logits(live["student"][n], head)[: case["ids"]]
        z_t = logits(teacher, case["teacher_head"])[: case["teacher_ids"]]
        total += share_of_kd * compare(z_s, z_t)
    return total


# --- spans --------------------------------------------------------------------------------------------


def binary_kl(student, teacher, tau):
    """In 80 digits, so that no rounding has to be thought about; both sides held in [-1e30, -1e-6]."""
    with decimal.localcontext(prec=80):
        a, b = (Decimal(max(-1e30, min(-1e-6, x))) / Decimal(tau) for x in (teacher, student))
        p, q = a.exp(), b.exp()
        said = p * (a - b) if p > 0 else Decimal(0)
        return float(said + (1 - p) * ((1 - p).ln() - (1 - q).ln()))


def spans_loss(case, live, spans, tau):
    """spans: list of (response rows, log-likelihood under the teacher)."""
    head = moving_head(case, live)
    total = 0.0
    for rows, teacher in spans:
        student = -math.fsum(cross_entropy(logits(live["student"][r], head), case["gold"][r]) for r in rows)
        total += binary_kl(student, teacher, tau)
    return total


# --- cross-model attention -----------------------------------------------------------------------------


def deviation(rows):
    entries = [x for row in rows for x in row]
    mean = math.fsum(entries) / len(entries)
    found = math.sqrt(math.fsum((x - mean) ** 2 for x in entries) / len(entries))
    return found if found > 0 else 1.0


def attended(case, query, t2s, s2t, student):
    """Rows in the student's and in the teacher's space, row after row; zeros where a row attends to nothing."""
    N, M = len(case["sample"]), len(case["teacher_sample"])
    width, teacher_width = len(t2s[0]), len(t2s)
    root = math.sqrt(len(query[0]))

    def score(n, m):
        members = [k for k in range(M) if case["teacher_sample"][k] == case["teacher_sample"][m]]
        std = deviation([case["teacher_pairs"][k] for k in members])
        asked = row_times_matrix(case["student_pairs"][n], query)
        return math.fsum(a * b / std for a, b in zip(asked, case["teacher_pairs"][m], strict=True)) / root

    def value(m):
        members = [k for k in range(M) if case["teacher_sample"][k] == case["teacher_sample"][m]]
        std = deviation([case["teacher"][k] for k in members])
        std_of_embeddings = deviation([case["argmax_embeddings"][k] for k in members])
        mixed = [
            h / std + e / std_of_embeddings
            for h, e in zip(case["teacher"][m], case["argmax_embeddings"][m], strict=True)
        ]
        return row_times_matrix(mixed, t2s)

    def mixture(weights, rows, size):
        return [math.fsum(w * row[i] for w, row in zip(weights, rows, strict=True)) for i in range(size)]

    in_student, in_teacher = [], []
    for n, sample in enumerate(case["sample"]):
        seen = [m for m in range(M) if sample >= 0 and case["teacher_sample"][m] == sample]
        weights = softmax([score(n, m) for m in seen]) if seen else []
        in_student.append(mixture(weights, [value(m) for m in seen], width))
    for m, sample in enumerate(case["teacher_sample"]):
        seen = [n for n in range(N) if sample >= 0 and case["sample"][n] == sample]
        weights = softmax([score(n, m) for n in seen]) if seen else []
        in_teacher.append(mixture(weights, [row_times_matrix(student[n], s2t) for n in seen], teacher_width))
    return in_student, in_teacher


def attention_terms(case, live):
    """Sum and count of each term. A term takes from `live` what its gradient may reach and the rest from `case`."""
    live_head = moving_head(case, live)
    ids, tau, distance = case["ids"], case["temperature"], DISTANCES[case["distance"]]
    out = Sums()
    for r, gold in enumerate(case["gold"]):
        out.add("ce", cross_entropy(logits(live["student"][r], live_head), gold))
    moving_t2s, moving_s2t = attended(case, live["query"], live["t2s"], live["s2t"], live["student"])
    fixed_t2s, _ = attended(case, case["query"], case["t2s"], case["s2t"], case["student"])
    for n, sample in enumerate(case["sample"]):
        if sample < 0 or sample not in case["teacher_sample"]:
            continue
        out.add("t2s_ce", cross_entropy(logits(moving_t2s[n], case["head"]), case["gold"][n]))
        fixed = logits(fixed_t2s[n], case["head"])[:ids]
        right = argmax(fixed) == case["gold"][n]
        out.add("t2s_agreement", float(right))
        if right or not case["agreement_mask"]:
            q = softmax(logits(live["student"][n], live_head)[:ids], tau)
            out.add("t2s_kd", distance(softmax(fixed, tau), q))
    for m, sample in enumerate(case["teacher_sample"]):
        if sample < 0 or sample not in case["sample"]:
            continue
        real = case["teacher_ids"]
        truth = logits(case["teacher"][m], case["teacher_head"])[:real]
        seen = logits(moving_s2t[m], case["teacher_head"])[:real]
        out.add("s2t_kd", distance(softmax(truth, tau), softmax(seen, tau)))
        out.add("s2t_agreement", float(argmax(seen) == argmax(truth)))
    return out


def attention_loss(case, live, shares, divisors):
    found = attention_terms(case, live)
    return math.fsum(shares[name] * found[name][0] / divisors[name] for name in shares if divisors[name])


# --- derivatives ---------------------------------------------------------------------------------------


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


# --- exact target --------------------------------------------------------------------------------------


def event_masses(p, event, count):
    """Sum of the probabilities of each event."""
    return [math.fsum(a for a, e in zip(p, event, strict=True) if e == k) for k in range(count)]


def wanted_masses(p, q, student_event, teacher_event, count):
    """The teacher's masses p by event; of the last event, where one side has no id of it, the student's opinion q."""
    wanted, own = event_masses(p, teacher_event, count), event_masses(q, student_event, count)
    last = count - 1
    if last not in teacher_event:
        return [(1 - own[last]) * a for a in wanted[:last]] + [own[last]]
    if last not in student_event:
        return [a + wanted[last] * b for a, b in zip(wanted[:last], own[:last], strict=True)] + [0.0]
    return wanted


def exact_target(p, q, share, student_event, teacher_event, count):
    """Probability of each student id: its event's mass under the teacher, shared out as `share` has it."""
    wanted, whole = wanted_masses(p, q, student_event, teacher_event, count), event_masses(share, student_event, count)
    return [wanted[e] * a / whole[e] for a, e in zip(share, student_event, strict=True)]


def exact_loss(case, live, exact):
    """(1 - r) ce + r (t2s_kd + t2s_ce), each a mean over its rows.

    exact: student_event, teacher_event, count, inside (the projected teacher shares), soft (labels).
    """
    ids, tau, r = case["ids"], case["temperature"], case["kd_ratio"]
    events = exact["student_event"], exact["teacher_event"], exact["count"]
    live_head = moving_head(case, live)
    ce = [cross_entropy(logits(row, live_head), gold) for row, gold in zip(live["student"], case["gold"], strict=True)]
    kd, labels = [], []
    for n, teacher in enumerate(case["teacher"]):
        z_t = logits(teacher, case["teacher_head"])[: case["teacher_ids"]]
        fixed = logits(row_times_matrix(teacher, case["t2s"]), case["head"])[:ids]
        own = softmax(logits(case["student"][n], case["head"])[:ids], tau)
        share = softmax(fixed, tau) if exact["inside"] else own
        target = exact_target(softmax(z_t, tau), own, share, *events)
        moving = softmax(logits(live["student"][n], live_head)[:ids], tau)
        kd.append(distance_of(case["distance"], target, moving, own))
        shown = softmax(logits(row_times_matrix(teacher, live["t2s"]), case["head"])[:ids])
        seen = event_masses(shown, events[0], events[2])
        if exact["soft"]:
            start = softmax(fixed)
            labels.append(kl(wanted_masses(softmax(z_t), start, *events), seen))
        else:
            label = events[1][argmax(z_t)]
            labels.append(-math.log(seen[label]) if label in events[0] else 0.0)
    return sum((1 - r) * x / len(ce) for x in ce) + sum(r * (a + b) / len(kd) for a, b in zip(kd, labels, strict=True))


# --- rows without a partner -----------------------------------------------------------------------------


def weighted_cross_entropy(case, live, weights):
    """Sum over the response rows of weight x cross-entropy."""
    head = moving_head(case, live)
    return math.fsum(
        weight * cross_entropy(logits(live["student"][r], head), case["gold"][r]) for r, weight in enumerate(weights)
    )


# --- KD at the size of the cross-entropy ----------------------------------------------------------------


def kd_scale(steps, largest):
    """steps: (mean ce, mean kd) of every step so far, the oldest first."""
    ce = math.fsum(0.95**age * value for age, (value, _) in enumerate(reversed(steps)))
    kd = math.fsum(0.95**age * value for age, (_, value) in enumerate(reversed(steps)))
    if not steps or (ce == 0 and kd == 0):
        return 1.0
    return largest if ce > largest * kd else ce / kd


def scaled_loss(case, live, scale):
    """dskd with t2s_kd and s2t_kd, but not t2s_ce, multiplied with a number."""
    found, r, div = terms(case, live), case["kd_ratio"], case["divisors"]
    moving = found["t2s_kd"][0] / div["t2s_kd"] + found["s2t_kd"][0] / div["s2t_kd"]
    return (1 - r) * found["ce"][0] / div["ce"] + r * (scale * moving + found["t2s_ce"][0] / div["t2s_ce"])


# --- a few shared ids -----------------------------------------------------------------------------------


def compare_support(z_s, z_t, tau, kind, pairs, size):
    """Probabilities first, then those of the shared ids that the student finds likeliest, divided by their sum."""
    chosen = sorted(pairs, key=lambda pair: -z_s[pair[0]])[:size]
    q, p = softmax(z_s, tau), softmax(z_t, tau)
    whole_q, whole_p = math.fsum(q[i] for i, _ in chosen), math.fsum(p[j] for _, j in chosen)
    return DISTANCES[kind]([p[j] / whole_p for _, j in chosen], [q[i] / whole_q for i, _ in chosen])


# --- the teacher by bytes --------------------------------------------------------------------------------


def opened(text, tokens):
    """The longest of some tokens that a text begins with, None for none."""
    best = None
    for token_id, token in enumerate(tokens):
        longer = best is None or len(token or b"") > len(tokens[best])
        if token and text.startswith(token) and longer:
            best = token_id
    return best


def prefix_target(rows, teacher, student, same, *, begun=b"", lead=b"", said=()):
    """Mass of each student token, and at last what none of them takes, by going through all teacher tokens.

    rows: the teacher's probabilities at its row and at those that follow along the text; said: the teacher tokens that
    the text goes on with at all of them but the last. begun: bytes of the first that were said before the student's
    token; lead: bytes of that one before the first. same: student token of a special one.
    """
    masses = [0.0] * (len(student) + 1)
    text, weight = lead, 1.0
    for k, row in enumerate(rows):
        cut = begun if k == 0 else b""
        possible = [v for v in range(len(row)) if not cut or (teacher[v] or b"").startswith(cut)]
        whole = math.fsum(row[v] for v in possible)
        onward = None
        for v in possible:
            share = weight * row[v] / whole
            if k < len(rows) - 1 and v == said[k]:
                onward = share
                continue
            if teacher[v] is None and text == b"" and k == 0:
                to = same.get(v)
            else:
                to = opened(text + (teacher[v] or b"")[len(cut) :], student)
            masses[len(student) if to is None else to] += share
        if onward is not None:
            text, weight = text + teacher[said[k]][len(cut) :], onward
    return masses


def compare_masses(q, masses, kind):
    """The student's probabilities against masses of its tokens; what the teacher cannot say is one class."""
    pooled = [a if m > 0 else 0.0 for a, m in zip(q, masses, strict=False)]
    pooled.append(math.fsum(a for a, m in zip(q, masses, strict=False) if m == 0))
    wanted = list(masses)
    if pooled[-1] == 0:
        wanted = [m + masses[-1] * a for m, a in zip(masses[:-1], q, strict=True)] + [0.0]
    return distance_of(kind, wanted, pooled, pooled)


# --- segments -------------------------------------------------------------------------------------------


def side_of(states, head, real, rows, golds):
    """One side of a segment: the logits of each of its tokens, and the token."""
    return [logits(states[r], head)[:real] for r in rows], [golds[r] for r in rows]


def segments_loss(case, live, segments, teacher_golds, distance):
    """Sum over segments of distance(student side, teacher side, paired).

    segments: (student rows, teacher rows, paired) each. teacher_golds: the token after each teacher row.
    """
    head = {**case["head"], "weight": live["weight"], "bias": live["bias"]}
    total = 0.0
    for rows, teacher_rows, paired in segments:
        student = side_of(live["student"], head, case["ids"], rows, case["gold"])
        teacher = side_of(case["teacher"], case["teacher_head"], case["teacher_ids"], teacher_rows, teacher_golds)
        total += distance(student, teacher, paired)
    return total


def extended(student, teacher, paired, tau, kind, pairs):
    """Shared ids at the first token, and beside them the mean logit of the span's own tokens."""
    both = []
    for side, (all_logits, golds) in enumerate((student, teacher)):
        row = [all_logits[0][pair[side]] for pair in pairs]
        if not paired:
            row.append(math.fsum(z[y] for z, y in zip(all_logits, golds, strict=True)) / len(golds))
        both.append(softmax(row, tau))
    return DISTANCES[kind](both[1], both[0])


def completions(texts, golds):
    """(student id, teacher id) of the last tokens that complete one text; golds: the tokens of each side.

    texts: bytes by id of each side.
    """
    observed = (golds[0][-1], golds[1][-1])
    if len(golds[0]) == 1 and len(golds[1]) > 1:
        before = b"".join(texts[1][y] or b"?" for y in golds[1][:-1])
        alike = [(i, j) for i, a in enumerate(texts[0]) for j, b in enumerate(texts[1]) if a and b and a == before + b]
    elif len(golds[1]) == 1 and len(golds[0]) > 1:
        before = b"".join(texts[0][y] or b"?" for y in golds[0][:-1])
        alike = [(i, j) for i, a in enumerate(texts[0]) for j, b in enumerate(texts[1]) if a and b and before + a == b]
    else:
        alike = []
    return alike if observed in alike else [observed]


def hybrid(student, teacher, tau, beta, weights, pairs):
    """Probabilities of whole segments: JS on the matched ids, L1 of the sorted others."""
    both = []
    for all_logits, golds in (student, teacher):
        behind = math.prod(softmax(z, tau)[y] for z, y in zip(all_logits[1:], golds[1:], strict=True))
        both.append([behind * p for p in softmax(all_logits[0], tau)])
    own, theirs = both
    matched = DISTANCES["js"]([theirs[j] for _, j in pairs], [own[i] for i, _ in pairs], beta)
    own_rest = sorted(p for i, p in enumerate(own) if i not in {i for i, _ in pairs})
    their_rest = sorted(p for j, p in enumerate(theirs) if j not in {j for _, j in pairs})
    ranks = 0.0
    while own_rest or their_rest:
        ranks += abs((own_rest.pop() if own_rest else 0.0) - (their_rest.pop() if their_rest else 0.0))
    return weights[0] * matched + weights[1] * ranks


def likelihood(student, teacher, tau):
    """How far the likelihoods of the segment's own tokens are apart."""
    own, theirs = (
        math.fsum(-cross_entropy(z, y) for z, y in zip(all_logits, golds, strict=True))
        for all_logits, golds in (student, teacher)
    )
    return binary_kl(own, theirs, tau)


def common_support(student, teacher, paired, tau, kind, pairs, texts):
    """Probabilities of what both can say with the tokens so far held fixed, and 1 minus their sum."""
    events = pairs if paired else completions(texts, (student[1], teacher[1]))
    both = []
    for side, (all_logits, golds) in enumerate((student, teacher)):
        before = math.prod(softmax(z, tau)[y] for z, y in zip(all_logits[:-1], golds[:-1], strict=True))
        last = softmax(all_logits[-1], tau)
        said = [before * last[event[side]] for event in events]
        both.append([*said, 1 - math.fsum(said)])
    return DISTANCES[kind](both[1], both[0])


def projected(z_s, z_t, tau, kind, entries, size):
    """The student's probabilities moved by (student id, teacher id, weight) entries, on the teacher's likeliest ids."""
    q, p = softmax(z_s, tau), softmax(z_t, tau)
    reached = sorted({j for _, j, _ in entries}, key=lambda j: -z_t[j])[:size]
    moved = [math.fsum(w * q[i] for i, u, w in entries if u == j) for j in reached]
    kept = [p[j] for j in reached]
    return DISTANCES[kind]([a / math.fsum(kept) for a in kept], [b / math.fsum(moved) for b in moved])
