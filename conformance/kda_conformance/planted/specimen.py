"""A correct implementation in which bugs are planted: chunkwise, in plain torch, with its derivative written out.

Its text is edited by ``catalogue/*.toml`` before it is run, so it is written for that: one step a line, nothing shared between forward
and backward, every place where a real kernel has gone wrong a place of its own. Within a chunk, ``G`` is the inclusive cumulative log
decay, ``E = exp(G)``, ``rest = exp(G_last - G)``, and [KL eqs. 2-9]:

    L_ij = k_i k_j exp(G_i - G_j), i > j          P_ij = scale q_i k_j exp(G_i - G_j), i >= j
    X = (I + Diag(beta) L)^-1                     r = v - (E k) S            p = X (beta r)
    o = scale (E q) S + P p                       S <- E_last S + (rest k)^T p

Dimension letters: B rows, T tokens, H query/key heads, G value heads, K key width, V value width, N sequences, C tokens of a chunk.
"""

from __future__ import annotations

import torch
from kda_reference import KdaInputs, check_inputs

CHUNK = 64
STRIP = 16
EPSILON = 1e-6
WIDE = torch.float32
OPERAND = None
STATE = None
TENSORS = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")


def chunk_kda(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, **options):
    """Evaluate a call; see :class:`kda_reference.KdaInputs`."""
    x = KdaInputs(
        q=q, k=k, v=v, g=g, beta=beta, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, **options,
    )  # fmt: skip
    check_inputs(x)
    return Call.apply(x, *(getattr(x, name) for name in TENSORS))


class Call(torch.autograd.Function):
    """The call as one node of the derivative graph."""

    @staticmethod
    def forward(ctx, x, *tensors):
        """Run the forward pass and keep the inputs and the states before each chunk."""
        x = x.replace(**{n: t.detach() for n, t in zip(TENSORS, tensors, strict=True) if t is not None})
        saved = activate(x)
        o, final, states = run(x, saved)
        ctx.x, ctx.saved, ctx.states = x, saved, states
        ctx.set_materialize_grads(False)
        final = final.transpose(-1, -2).contiguous() if x.state_v_first else final
        return o.to(x.v.dtype), final.to(state_dtype(x)) if x.output_final_state else None

    @staticmethod
    def backward(ctx, do, dfinal):
        """Run the backward pass; the gradients have the dtypes of the inputs."""
        found = differentiate(ctx.x, ctx.saved, ctx.states, do, dfinal)
        inputs = (getattr(ctx.x, name) for name in TENSORS)
        return (None, *(None if t is None else found[n].to(t.dtype) for n, t in zip(TENSORS, inputs, strict=True)))


def state_dtype(x):
    return torch.float64 if x.q.dtype == torch.float64 else torch.float32


def activate(x):
    """Return what the chunks read, in the wide dtype and per value head, and what the derivative of the activations needs."""
    q, k, v, g, beta = (t.to(WIDE) for t in (x.q, x.k, x.v, x.g, x.beta))
    q_norm = k_norm = None
    if x.use_qk_l2norm_in_kernel:
        q_norm = (q.square().sum(-1, keepdim=True) + EPSILON).rsqrt()
        k_norm = (k.square().sum(-1, keepdim=True) + EPSILON).rsqrt()
        q = q * q_norm
        k = k * k_norm
    logit = slope = None
    if x.use_gate_in_kernel:
        logit = g
        if x.dt_bias is not None:
            logit = logit + x.dt_bias.to(WIDE).reshape(g.shape[2], g.shape[3])
        slope = torch.ones(g.shape[2], 1, dtype=WIDE) if x.A_log is None else x.A_log.to(WIDE).exp()[:, None]
        if x.lower_bound is None:
            g = -slope * softplus(logit)
        else:
            g = x.lower_bound * torch.sigmoid(slope * logit)
    if x.use_beta_sigmoid_in_kernel:
        beta = torch.sigmoid(beta)
        if x.allow_neg_eigval:
            beta = 2 * beta
    group = v.shape[2] // q.shape[2]
    q_G = q.repeat_interleave(group, 2)
    k_G = k.repeat_interleave(group, 2)
    return {
        "q": q_G,
        "k": k_G,
        "v": v,
        "g": g,
        "beta": beta,
        "q_norm": q_norm,
        "k_norm": k_norm,
        "logit": logit,
        "slope": slope,
    }


def softplus(logit):
    return torch.nn.functional.softplus(logit.double(), threshold=700.0).to(WIDE)


def segments(x):
    """Return ``(row, first token, end)`` of each sequence."""
    if x.cu_seqlens is None:
        return [(row, 0, x.q.shape[1]) for row in range(x.q.shape[0])]
    offsets = x.cu_seqlens.tolist()
    return [(0, offsets[n], offsets[n + 1]) for n in range(len(offsets) - 1)]


def chunks(start, end):
    """Return the spans of the chunks of one sequence."""
    return [slice(at, min(at + CHUNK, end)) for at in range(start, end, CHUNK)]


def run(x, saved):
    """Walk each sequence; return ``o``, the final states ``[N, G, K, V]`` and the states before each chunk."""
    heads, k_width, v_width = x.v.shape[2], x.k.shape[3], x.v.shape[3]
    o = torch.empty(x.v.shape, dtype=WIDE)
    final = torch.empty(x.num_sequences, heads, k_width, v_width, dtype=WIDE)
    states = {}
    for n, (row, start, end) in enumerate(segments(x)):
        S = torch.zeros(heads, k_width, v_width, dtype=WIDE)
        if x.initial_state is not None:
            S = x.initial_state[n].to(WIDE)
            if x.state_v_first:
                S = S.transpose(-1, -2)
        for span in chunks(start, end):
            q, k, v, g, beta = part(saved, row, span)
            states[row, span.start] = S
            o_C, S = chunk_forward(q, k, v, g, beta, S, x.effective_scale)
            o[row, span] = o_C.transpose(0, 1)
        final[n] = S
    return o, final, states


def part(saved, row, span):
    """Return one chunk with heads first: ``[G, C, width]`` and beta ``[G, C, 1]``."""
    q, k, v, g = (saved[name][row, span].transpose(0, 1) for name in "qkvg")
    beta = saved["beta"][row, span].transpose(0, 1)[..., None]
    return q, k, v, g, beta


def product(a, b):
    """Multiply, with operands rounded to the operand format."""
    if OPERAND is not None:
        a = a.to(OPERAND).to(WIDE)
        b = b.to(OPERAND).to(WIDE)
    return a @ b


def cumulative(g):
    return g.double().cumsum(1)


def decay(difference):
    return difference.exp().to(WIDE)


def pairs(a, b, G):
    """Return ``sum_d a_id b_jd exp(G_id - G_jd)`` for i >= j, strip by strip with a reference row each."""
    rows = []
    for first in range(0, a.shape[1], STRIP):
        end = min(first + STRIP, a.shape[1])
        a_S, b_S, G_S = a[:, first:end], b[:, first:end], G[:, first:end]
        anchor = G[:, first : first + 1]
        raised = a_S * decay(G_S - anchor)
        lowered = b[:, :first] * decay(anchor - G[:, :first])
        past = product(raised, lowered.transpose(1, 2))
        inside = (G_S[:, :, None] - G_S[:, None]).clamp(max=0)
        here = (a_S[:, :, None] * b_S[:, None] * decay(inside)).sum(-1).tril()
        after = torch.zeros(a.shape[0], end - first, a.shape[1] - end, dtype=WIDE)
        rows.append(torch.cat([past, here, after], 2))
    return torch.cat(rows, 1)


def inverse(A):
    """Return ``(I + A)^-1`` of a strictly lower ``A`` by forward substitution."""
    unit = torch.eye(A.shape[-1], dtype=WIDE).expand_as(A)
    return torch.linalg.solve_triangular(unit + A, unit, upper=False, unitriangular=True)


def chunk_forward(q, k, v, g, beta, S, scale):
    """Return ``o`` of one chunk and the state after it."""
    G = cumulative(g)
    E = decay(G)
    rest = decay(G[:, -1:] - G)
    L = pairs(k, k, G).tril(-1)
    P = scale * pairs(q, k, G)
    X = inverse(beta * L)
    r = v - product(E * k, S)
    p = product(X, beta * r)
    o = scale * product(E * q, S) + product(P, p)
    S = E[:, -1, :, None] * S + product((rest * k).transpose(1, 2), p)
    if STATE is not None:
        S = S.to(STATE).to(WIDE)
    return o, S


def differentiate(x, saved, states, do, dfinal):
    """Return the gradients of ``<do, o> + <dfinal, final_state>`` by argument name."""
    names = ("q", "k", "v", "g", "beta")
    d = {name: torch.empty_like(saved[name]) for name in names}
    heads, k_width, v_width = x.v.shape[2], x.k.shape[3], x.v.shape[3]
    dinitial = torch.empty(x.num_sequences, heads, k_width, v_width, dtype=WIDE)
    for n, (row, start, end) in enumerate(segments(x)):
        dS = torch.zeros(heads, k_width, v_width, dtype=WIDE)
        if dfinal is not None:
            dS = dfinal[n].to(WIDE)
            if x.state_v_first:
                dS = dS.transpose(-1, -2)
        for span in reversed(chunks(start, end)):
            S = states[row, span.start]
            do_C = torch.zeros(heads, span.stop - span.start, v_width, dtype=WIDE)
            if do is not None:
                do_C = do[row, span].transpose(0, 1).to(WIDE)
            found = chunk_backward(*part(saved, row, span), S, do_C, dS, x.effective_scale)
            for name in names:
                d[name][row, span] = found[name].transpose(0, 1)
            dS = found["S"]
        dinitial[n] = dS
    return pull_back(x, saved, d, dinitial)


def chunk_backward(q, k, v, g, beta, S, do, dS, scale):
    """Return the gradients of one chunk; ``dS`` is the cotangent of the state after it."""
    G = cumulative(g)
    E = decay(G)
    rest = decay(G[:, -1:] - G)
    L = pairs(k, k, G).tril(-1)
    P = scale * pairs(q, k, G)
    X = inverse(beta * L)
    r = v - product(E * k, S)
    p = product(X, beta * r)
    dp = product(P.transpose(1, 2), do) + product(rest * k, dS)
    dz = product(X.transpose(1, 2), dp)
    dr = beta * dz
    dbeta = (dz * (r - product(L, p))).sum(-1)
    dL = -product(dr, p.transpose(1, 2)).tril(-1)
    dP = scale * product(do, p.transpose(1, 2)).tril()
    dq_state = scale * product(do, S.transpose(1, 2)) * E
    dk_state = -product(dr, S.transpose(1, 2)) * E
    dk_rest = product(p, dS.transpose(1, 2)) * rest
    dlast = E[:, -1] * (S * dS).sum(-1)
    dq_pairs, dk_pairs, dG_pairs = pairs_backward(q, k, G, dP, dL)
    dG = (q * dq_state + k * dk_state - k * dk_rest).double() + dG_pairs
    dG[:, -1] += (dlast + (k * dk_rest).sum(1)).double()
    dg = dG.flip(1).cumsum(1).flip(1).to(WIDE)
    dS = E[:, -1, :, None] * dS + scale * product((E * q).transpose(1, 2), do)
    dS = dS - product((E * k).transpose(1, 2), dr)
    dq = dq_state + dq_pairs
    dk = dk_state + dk_rest + dk_pairs
    return {"q": dq, "k": dk, "v": dr, "g": dg, "beta": dbeta, "S": dS}


def pairs_backward(q, k, G, dP, dL):
    """Return the gradients of q, k and G through the pairs of tokens."""
    D = decay((G[:, :, None] - G[:, None]).clamp(max=0))
    to_q = dP[..., None] * D * k[:, None]
    to_k = dL[..., None] * D * k[:, None]
    back = D * (dP[..., None] * q[:, :, None] + dL[..., None] * k[:, :, None])
    dq = to_q.sum(2)
    dk_row = to_k.sum(2)
    dk_column = back.sum(1)
    dG = (q * dq + k * dk_row - k * dk_column).double()
    return dq, dk_row + dk_column, dG


def pull_back(x, saved, d, dinitial):
    """Carry the gradients through the activations."""
    found = {"v": d["v"], "initial_state": dinitial}
    if x.state_v_first:
        found["initial_state"] = dinitial.transpose(-1, -2)
    group = x.v.shape[2] // x.q.shape[2]
    for name in ("q", "k"):
        dy = d[name].unflatten(2, (-1, group)).sum(3)
        norm = saved[f"{name}_norm"]
        if norm is not None:
            y = getattr(x, name).to(WIDE) * norm
            dy = norm * (dy - y * (y * dy).sum(-1, keepdim=True))
        found[name] = dy
    found["beta"] = d["beta"]
    if x.use_beta_sigmoid_in_kernel:
        ceiling = 2.0 if x.allow_neg_eigval else 1.0
        raw = x.beta.to(WIDE)
        found["beta"] = d["beta"] * ceiling * torch.sigmoid(raw) * torch.sigmoid(-raw)
    found["g"] = d["g"]
    if x.use_gate_in_kernel:
        slope, logit = saved["slope"], saved["logit"]
        if x.lower_bound is None:
            dlogit = -d["g"] * slope * torch.sigmoid(logit)
            dA = -d["g"] * slope * softplus(logit)
        else:
            z = slope * logit
            dz = d["g"] * x.lower_bound * torch.sigmoid(z) * torch.sigmoid(-z)
            dlogit = dz * slope
            dA = dz * z
        found["g"] = dlogit
        found["A_log"] = dA.sum((0, 1, 3))
        found["dt_bias"] = dlogit.sum((0, 1)).flatten()
    return found


chunk_kda.precision = "fp32"
chunk_kda.checks_arguments = True
