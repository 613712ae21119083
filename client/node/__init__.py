"""A device in a federation: its state directory, policy, enrolment, its steps of the protocol, and its Flower app.

The app is ``client.node.app:app``, around the steps of ``client.node.step``. It is not exported here, because it
imports Flower, which enrolment does not need.
"""

from client.node.enrolment import TrustAnchors, enrol, install_certificate
from client.node.policy import PolicySettings
from client.node.statedir import DeviceSettings, DeviceStateDir

__all__ = ["DeviceSettings", "DeviceStateDir", "PolicySettings", "TrustAnchors", "enrol", "install_certificate"]
