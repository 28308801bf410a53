"""The errors a KDA call may raise, one class per kind of mistake.

Every message has one form: ``<what> must <rule>, got <value> [at <axis=index>]; <next step>``.
"""


class KdaError(ValueError):
    """Base of every error this project raises about the arguments of a KDA call."""


class ShapeError(KdaError):
    """Two arguments disagree on an axis, or an argument has the wrong number of axes."""


class DtypeError(KdaError):
    """An argument has a dtype that the contract does not allow in its place."""


class DeviceError(KdaError):
    """Arguments live on different devices, or on one the implementation cannot use."""


class DomainError(KdaError):
    """A value lies outside its domain, such as a positive log decay or a NaN."""


class PackingError(KdaError):
    """``cu_seqlens`` does not describe a packing of the given tokens."""


class FlagError(KdaError):
    """A flag misses the argument it needs, or excludes another that was given."""


class CertificateError(KdaError):
    """The reference cannot certify its result closely enough for anything to be judged with it."""
