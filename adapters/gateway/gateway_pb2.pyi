from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Hello(_message.Message):
    __slots__ = ("certificate", "binding", "version")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    BINDING_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    binding: bytes
    version: str
    def __init__(self, certificate: _Optional[bytes] = ..., binding: _Optional[bytes] = ..., version: _Optional[str] = ...) -> None: ...

class Request(_message.Message):
    __slots__ = ("id", "step", "fields", "blobs")
    class FieldsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    class BlobsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Blob
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Blob, _Mapping]] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    id: int
    step: str
    fields: _containers.ScalarMap[str, bytes]
    blobs: _containers.MessageMap[str, Blob]
    def __init__(self, id: _Optional[int] = ..., step: _Optional[str] = ..., fields: _Optional[_Mapping[str, bytes]] = ..., blobs: _Optional[_Mapping[str, Blob]] = ...) -> None: ...

class Blob(_message.Message):
    __slots__ = ("sha256", "size")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    sha256: bytes
    size: int
    def __init__(self, sha256: _Optional[bytes] = ..., size: _Optional[int] = ...) -> None: ...

class Range(_message.Message):
    __slots__ = ("sha256", "offset")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    sha256: bytes
    offset: int
    def __init__(self, sha256: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class AnswerPart(_message.Message):
    __slots__ = ("beginning", "data")
    BEGINNING_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    beginning: Beginning
    data: bytes
    def __init__(self, beginning: _Optional[_Union[Beginning, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class Beginning(_message.Message):
    __slots__ = ("request", "size", "reason")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    request: int
    size: int
    reason: Reason
    def __init__(self, request: _Optional[int] = ..., size: _Optional[int] = ..., reason: _Optional[_Union[Reason, _Mapping]] = ...) -> None: ...

class Reason(_message.Message):
    __slots__ = ("code", "text")
    CODE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    code: int
    text: str
    def __init__(self, code: _Optional[int] = ..., text: _Optional[str] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("devices", "requests", "seconds")
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    devices: int
    requests: int
    seconds: int
    def __init__(self, devices: _Optional[int] = ..., requests: _Optional[int] = ..., seconds: _Optional[int] = ...) -> None: ...

class EnrolRequest(_message.Message):
    __slots__ = ("token", "request", "tls_request")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    TLS_REQUEST_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    request: bytes
    tls_request: bytes
    def __init__(self, token: _Optional[bytes] = ..., request: _Optional[bytes] = ..., tls_request: _Optional[bytes] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("certificate", "signature", "tls_request")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    TLS_REQUEST_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    signature: bytes
    tls_request: bytes
    def __init__(self, certificate: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., tls_request: _Optional[bytes] = ...) -> None: ...

class Enrolled(_message.Message):
    __slots__ = ("certificate", "tls_certificate")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    TLS_CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    tls_certificate: bytes
    def __init__(self, certificate: _Optional[bytes] = ..., tls_certificate: _Optional[bytes] = ...) -> None: ...
