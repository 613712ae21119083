"""The agent of a light device: it attends at a gateway, and answers each request with a step of ``client.node.step``.

It attends only while its owner's conditions are met (``client.node.eligibility``), and has its certificate renewed
before that ends (``client.gateway.enrolment``). The gateway's TLS is verified under the pinned authority, and the
identity signs its challenge. What can pass by itself is tried again, at each address in turn, after a pause that grows
or that the gateway names; a refusal ends the agent. An answer that did not reach the gateway or the coordinator, which
then asks again, is sent again and never made again: the device's state has moved on."""

import hashlib
import logging
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import grpc

from aggregation.errors import ConfigError, EdgeAdaptError, ProtocolError
from aggregation.pki.certificates import load, subject
from aggregation.steps import Step
from client.gateway import calls
from client.gateway.enrolment import Renewal
from client.node.eligibility import LOOK, Condition, conditions, machine_conditions
from client.node.readings import Readings
from client.node.statedir import AGENT_LOCK, AUTHORITY, LONGEST, DeviceStateDir
from client.node.step import Refusal, RefusalCode, answer
from edgeadapt.formats import storage
from edgeadapt.formats.gateway import messages
from edgeadapt.formats.gateway.invitation import ADDRESSES

log = logging.getLogger("edgeadapt.agent")


@dataclass(slots=True)
class Agent:
    folder: Path  # the device's state directory
    addresses: tuple[str, ...]  # ``HOST:PORT`` of the gateway; several where another coordinator can take over
    readings: Readings = field(default_factory=Readings)
    look: float = LOOK  # seconds between two checks of the conditions
    _failed: int = 0  # addresses in a row, of the attempts so far
    _stop: threading.Event = field(default_factory=threading.Event)
    _call: grpc.Call | None = None
    _last: tuple[int, bytes, bytes | Refusal] | None = None  # id and digest of the last request, and its answer
    _answering: bool = False
    _declined: bool = False  # a condition is not met any more, or the certificate is not the newest
    _renewal: Renewal = field(init=False)

    def __post_init__(self) -> None:
        self._renewal = Renewal(self.folder)

    @classmethod
    def of(cls, folder: Path, gateway: str | None) -> "Agent":
        """Make the agent of a device at ``gateway``, ``HOST:PORT`` or several with commas; None: at its settings' one.
        Raises ConfigError: there is no address, or it is not valid; or as ``DeviceStateDir.open``."""
        address = gateway or DeviceStateDir.open(folder).settings.gateway
        if not address:
            raise ConfigError(f"{folder} names no gateway: give --gateway HOST:PORT", about="--gateway")
        if not re.fullmatch(ADDRESSES, address):
            raise ConfigError(f"--gateway is {address!r}, and not HOST:PORT, or several with commas", about="--gateway")
        return cls(folder, tuple(address.split(",")))

    @property
    def device(self) -> str:
        """Name of the device in its certificate. Raises as ``DeviceStateDir.open`` and its ``certificate``."""
        return subject(load(DeviceStateDir.open(self.folder).certificate))

    @property
    def address(self) -> str:
        return self.addresses[self._failed % len(self.addresses)]

    def stop(self) -> None:
        """End ``run`` soon; a step that is under way is finished."""
        self._stop.set()
        if self._call is not None:
            self._call.cancel()

    def run(self) -> None:
        """Attend until ``stop``. Raises ConfigError: another agent uses the state directory, or it is not one;
        TrustError: a file of it is missing or damaged, or its certificate has expired; EdgeAdaptError: the gateway
        refuses this device."""
        state_dir = DeviceStateDir.open(self.folder)
        refusal = ConfigError(f"another agent uses {self.folder}: end it first", about=AGENT_LOCK)
        with storage.locked_or(refusal, self.folder / AGENT_LOCK):
            self._run(state_dir)

    def _run(self, state_dir: DeviceStateDir) -> None:
        authority = storage.read(self.folder / AUTHORITY, LONGEST)
        while self._await_conditions():
            try:
                with calls.conversation(self.address, messages.ATTEND, authority) as talk:
                    self._begin(talk, state_dir)
                    self._failed %= len(self.addresses)  # begin with this address again
                    with self._looking(talk):
                        for asked in talk.requests():
                            if not self._declined:
                                self._handle(talk, asked)
                    if not self._declined and not self._come_back(talk.call):
                        self._pause(calls.FIRST_PAUSE)
            except grpc.RpcError as error:
                if self._stop.is_set():
                    return
                if self._declined:
                    continue
                if error.code() not in calls.PASSING:
                    raise calls.refusal(error, "the gateway") from error
                if self._come_back(error):
                    continue
                away, reason = self.address, f"{error.code().name}: {calls.one_line(error)}"
                self._failed += 1
                if self._failed % len(self.addresses):
                    log.info("no gateway at %s, trying %s: %s", away, self.address, reason)
                    continue
                seconds = calls.pause(self._failed // len(self.addresses), error)
                log.info("no gateway at %s, again in %.1f s: %s", away, seconds, reason)
                self._pause(seconds)

    def _begin(self, talk: calls.Conversation, state_dir: DeviceStateDir) -> None:
        """Prove the identity; returns once the gateway has admitted the device."""
        self._call = talk.call
        if self._stop.is_set():
            talk.call.cancel()
        nonce, host = messages.CHALLENGE.decode(talk.receive()).nonce, calls.host_of(self.address)
        signature = state_dir.identity.sign(messages.CHALLENGE_TAG, nonce + host.encode())
        now = int(time.time())
        hello = messages.DeviceHello(state_dir.certificate, host, signature, version("edgeadapt"), now)
        talk.send((messages.HELLO.encode(hello),))
        if talk.receive() != messages.ADMITTED:
            raise ProtocolError("the gateway neither admits nor refuses this device", about="gateway.admitted")
        log.info("connected to %s", self.address)

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self._stop.wait(min(left, self.look)):
            self._renewal.attempt()

    def _come_back(self, call: grpc.Call) -> bool:
        """Wait as the gateway asks at the end of a call. Returns False if it does not."""
        window = messages.retry_window(call.trailing_metadata())
        if window is None:
            return False
        seconds = max(calls.FIRST_PAUSE, calls.until(window))
        log.info("the gateway at %s: %s; again in %.1f s", self.address, calls.one_line(call), seconds)
        self._pause(seconds)
        return True

    def _await_conditions(self) -> bool:
        said: tuple[str, ...] = ()
        while not self._stop.is_set():
            self._renewal.attempt()
            unmet = self._unmet(to_join=True)
            if not unmet:
                self._declined = False
                return True
            names = tuple(each.name for each in unmet)
            if names != said:
                log.info("not eligible: %s", "; ".join(f"{each.name}: {each.reading}" for each in unmet))
                said = names
            self._stop.wait(self.look)
        return False

    def _unmet(self, *, to_join: bool) -> list[Condition]:
        """The conditions that are not met now: all, or only those of the machine."""
        now = datetime.now().astimezone()
        try:
            state_dir = DeviceStateDir.open(self.folder)  # the owner may have changed the settings
        except EdgeAdaptError as error:
            return [Condition("device.toml", str(error), met=False)]
        if to_join:
            demanded = conditions(state_dir, self.readings, now)
        else:
            demanded = machine_conditions(state_dir.eligibility, self.readings, now)
        return [each for each in demanded if not each.met]

    @contextmanager
    def _looking(self, talk: calls.Conversation) -> Iterator[None]:
        """End the conversation once a condition is not met while the block runs, unless a request is being answered. A
        new certificate ends it too: the gateway ends a connection whose certificate has expired."""
        done = threading.Event()

        def look() -> None:
            renewed = False
            while not done.wait(self.look):
                renewed = self._renewed() or renewed
                if not self._answering and (renewed or self._unmet(to_join=False)):
                    self._declined = True
                    talk.finish()  # after what is being sent
                    return

        looking = threading.Thread(target=look, name="eligibility")
        looking.start()
        try:
            yield
        finally:
            done.set()
            looking.join()

    def _renewed(self) -> bool:
        """Whether there are new certificates now. A failure that stays ends the agent before its next connection."""
        try:
            return self._renewal.attempt()
        except (EdgeAdaptError, OSError):
            return False

    def _handle(self, talk: calls.Conversation, asked: calls.Asked) -> None:
        self._answering = True
        try:
            reply = self._answered(asked)
            if isinstance(reply, Refusal):
                talk.send((messages.reason_message(asked.id, reply.code, reply.reason),))
            else:
                talk.send(messages.answer_messages(asked.id, reply))
            if isinstance(reply, Refusal) and reply.code is RefusalCode.NOT_ELIGIBLE:
                self._declined = True
                talk.finish()
        finally:
            self._answering = False

    def _answered(self, asked: calls.Asked) -> bytes | Refusal:
        """Answer a request, or send the last answer again if the request is repeated; what was refused may then be
        answered."""
        digest = _digest(asked)
        if self._last is not None:
            number, last, reply = self._last
            if number == asked.id or (last == digest and not isinstance(reply, Refusal)):
                return reply
        log.info("answering %s", asked.step)
        device = subject(load(DeviceStateDir.open(self.folder).certificate))
        node, opened = messages.node_of(device), partial(DeviceStateDir.open, self.folder)
        reply = answer(opened, Step(asked.step), asked.fields, node, readings=self.readings)
        self._last = asked.id, digest, reply
        return reply


def _digest(asked: calls.Asked) -> bytes:
    digests = (hashlib.sha256(content).digest() for content in asked.fields.values())
    named = zip(asked.fields, digests, strict=True)
    whole = b"".join(name.encode() + b"\x00" + digest for name, digest in sorted(named))
    return hashlib.sha256(asked.step.encode() + b"\x00" + whole).digest()
