"""The float64 ground truth of Kimi Delta Attention, and the contract a call must meet.

Reading order: ``recurrence.py`` (the definition, one screen), ``adjoint.py`` (its gradient), ``activations.py`` and
``pullback.py`` (what may stand in front, and back through it), ``chunkwise.py`` (a second, independent formula),
``certificate.py`` (how far float64 may be off), ``oracle.py`` (the same equations at 60 digits) and
``double_double_oracle.py`` (at 106 bits, for full size).
"""

from kda_reference.adjoint import recurrent_kda_vjp
from kda_reference.certificate import Certified, certified_kda, certified_kda_vjp
from kda_reference.chunkwise import chunkwise_kda
from kda_reference.contract import KdaGradients, KdaInputs, KdaResult, check_inputs, check_values
from kda_reference.double_double_oracle import double_double_kda
from kda_reference.errors import (
    CertificateError,
    DeviceError,
    DomainError,
    DtypeError,
    FlagError,
    KdaError,
    PackingError,
    ShapeError,
)
from kda_reference.oracle import OracleResult, oracle_gradient, oracle_jvp, oracle_kda
from kda_reference.recurrence import recurrent_kda

__all__ = [
    "CertificateError",
    "Certified",
    "DeviceError",
    "DomainError",
    "DtypeError",
    "FlagError",
    "KdaError",
    "KdaGradients",
    "KdaInputs",
    "KdaResult",
    "OracleResult",
    "PackingError",
    "ShapeError",
    "certified_kda",
    "certified_kda_vjp",
    "check_inputs",
    "check_values",
    "chunkwise_kda",
    "double_double_kda",
    "oracle_gradient",
    "oracle_jvp",
    "oracle_kda",
    "recurrent_kda",
    "recurrent_kda_vjp",
]
