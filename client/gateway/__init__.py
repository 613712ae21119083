"""A light device: it takes part in a federation through the coordinator's gateway, without Flower."""
