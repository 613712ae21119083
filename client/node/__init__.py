"""A device in a federation: its state directory, policy, enrolment, its steps of the protocol, and its Flower app."""
