"""The Kimi Linear model: KDA layers, multi-head latent attention, mixture of experts. Nothing is built yet.

What will live here, one idea a module: the KDA layer [KL eq. 10], latent attention without position encoding, the
expert layer, the hybrid stack of three KDA layers to one full-attention layer, its cache, and the loading of released
checkpoints. The operator itself comes from a kernel package; this package may import ``kda_reference`` for the call
contract and its errors, and never the conformance suite or the reports.
"""
