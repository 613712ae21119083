"""The enrolment authority as a person runs it: its folder, its record, its commands."""
