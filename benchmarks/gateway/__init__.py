"""The gateway under load: what a round costs beyond the devices' work, and how many devices one gateway serves."""
