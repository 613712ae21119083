"""The device: enrolment and Flower app, training, inference, the page for browsers, and their commands."""
