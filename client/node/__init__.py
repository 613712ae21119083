"""The device in a federation: its Flower app, state directory, policy and enrolment."""
